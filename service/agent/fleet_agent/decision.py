"""What follows from the answers of the instances: pure, and the only place where it is decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

READY = "ready"
DOWN = "down"
SILENT = "silent"

GUARD_STATES = frozenset({READY, "loading", "suspect", "recycling", "stopping", "failed"})
"""What a guard says of itself. Whatever is not ready takes no request."""

MISSES = 2
"""So many passes in a row without an answer make an instance silent: one lost packet is none."""


@dataclass(frozen=True)
class Answer:
    """What came of asking an instance: one of GUARD_STATES, DOWN (refused the connection) or SILENT."""

    state: str
    reason: str = ""
    since: str = ""
    """Since when it is so, ISO 8601, where the guard says."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """in_flight, waiting, queue, served, refused, failed, started, version and warning, as far as the guard told."""


@dataclass(frozen=True)
class Standing:
    """What is held of an instance; of one that was never heard, what the gateway does with it without any flag."""

    state: str = READY
    """One of GUARD_STATES or DOWN."""
    reason: str = "no answer yet"
    since: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    flagged: bool = False
    by_silence: bool = False
    """Flagged although it never said that it does not serve."""
    misses: int = 0

    @property
    def flag(self) -> str:
        """Text of the flag file, from which `from_flag` makes the standing again."""
        return f"{SILENT if self.by_silence else self.state}: {self.reason}"

    @classmethod
    def from_flag(cls, text: str, now: str) -> Standing:
        """The standing of an instance whose flag was found raised; `now` is ISO 8601."""
        state, _, reason = text.partition(":")
        by_silence = state == SILENT
        known = state if state in GUARD_STATES - {READY} else DOWN
        return cls(known, reason.strip() or "its flag was found raised", now, flagged=True, by_silence=by_silence)


@dataclass(frozen=True)
class Decision:
    """New standings by instance, and whether silence went beyond its share, so that it changed none."""

    standings: Mapping[str, Standing]
    unheard: int
    """Instances of which nothing but silence is known now."""
    held: bool


def decide(standings: Mapping[str, Standing], answers: Mapping[str, Answer], share: float, now: str) -> Decision:
    """Judge one pass.

    A definite answer counts at once, either way. Silence flags after MISSES passes, and only while no more than
    `share` (0 to 1) of all instances are unheard: else it is more likely the agent that is cut off, and every instance
    stays as it is. An instance without an answer in `answers` was not asked. `now` (ISO 8601) dates what changes.
    """
    unheard = sum(
        answers[name].state == SILENT if name in answers else standing.by_silence
        for name, standing in standings.items()
    )
    held = unheard > int(share * len(standings))
    judged = {
        name: _judge(standing, answers[name], held, now) if name in answers else standing
        for name, standing in standings.items()
    }
    return Decision(judged, unheard, held)


def _judge(standing: Standing, answer: Answer, held: bool, now: str) -> Standing:
    if answer.state != SILENT:
        since = answer.since or (standing.since if answer.state == standing.state else now)
        return Standing(answer.state, answer.reason, since, answer.numbers, flagged=answer.state != READY)
    misses = standing.misses + 1
    if misses < MISSES or held:
        # A flag keeps the reason it was raised for; of one that stays admitted, the doubt is shown.
        return replace(standing, reason=standing.reason if standing.flagged else answer.reason, misses=misses)
    since = standing.since if standing.state == DOWN else now
    by_silence = standing.by_silence or not standing.flagged
    return Standing(DOWN, answer.reason, since, flagged=True, by_silence=by_silence, misses=misses)

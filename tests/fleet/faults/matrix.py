"""Runs rows: each on a stage that is whole, followed by the reckoning and the question whether it is whole again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ..background import Background
from ..operations import wait_until
from .reckoning import Reckoning, most_in_flight, reckon
from .stage import Stage

READY_SECONDS = 120
QUIET_SECONDS = 1.5
"""Longer than an inference: work that outlives its client has ended."""

PROBE_SECONDS = 40
"""For how long it is tried to use all slots at once."""

Act = Callable[[Any], None]
"""What takes a Stage, or the one that it is for."""


@dataclass(frozen=True)
class Row:
    """One fault: its name, what it is in a line, and the function that has it happen under load and takes it away."""

    name: str
    text: str
    act: Act
    beside: bool
    """Whether rivals run it too."""


ROWS: dict[str, Row] = {}


def row(text: str, *, beside: bool = False) -> Callable[[Act], Act]:
    """Register a function as the row of its name."""

    def register(act: Act) -> Act:
        ROWS[act.__name__] = Row(act.__name__, text, act, beside)
        return act

    return register


@dataclass(frozen=True)
class Result:
    """A line of the table."""

    name: str
    text: str
    sums: Reckoning
    peak: int
    """Most in flight on one card."""
    slots: int
    unusable: int
    """Slots that were refused although the page called them free and ready."""
    unusable_seconds: float | None
    """For how long at most; None if to the end."""
    recovery_seconds: float | None
    """From when the fault was over, or had struck, until every slot was used; None if it did not come to that."""
    date: str = ""
    """When it was run, ISO 8601."""
    load: float | None = None
    """What the machine had to do already: its load average before the row."""
    note: str = ""
    """What else is worth knowing."""
    trouble: str = ""
    """Why the row itself could not be run to its end."""

    @property
    def faults(self) -> list[str]:
        """What should not have been."""
        found = [
            f"{kind}: {'; '.join(names)}" for kind in ("lost", "twice", "wrong") if (names := getattr(self.sums, kind))
        ]
        if self.peak > self.slots:
            found.append(f"{self.peak} in flight on a card with {self.slots} slots")
        if self.recovery_seconds is None:
            found.append("not every slot could be used again")
        if self.trouble:
            found.append(self.trouble)
        return found


class Watch(Background):
    """Since when all instances are said to be ready without a break, for the length of a `with` block."""

    def __init__(self, stage: Stage) -> None:
        """Look at what a stage's gateway tells."""
        super().__init__()
        self.ready_since: float | None = None
        self._stage = stage

    def work(self) -> None:
        while not self.ending.wait(0.2):
            states = self._stage.states()
            if not states or set(states.values()) != {"ready"}:
                self.ready_since = None
            elif self.ready_since is None:
                self.ready_since = time.monotonic()


def run(stage: Stage, chosen: Row) -> Result:
    """Have one fault happen; the stage is whole before and, by force if need be, after."""
    stage.begin()
    date, load = datetime.now(timezone.utc).isoformat(timespec="minutes"), round(os.getloadavg()[0], 1)
    trouble = ""
    with Watch(stage) as watch:
        try:
            chosen.act(stage)
            wait_until(lambda: watch.ready_since is not None, READY_SECONDS, stage.states)
        except Exception as error:  # the rows after this one are worth having too
            trouble = f"{type(error).__name__}: {error}"
        ready_since = watch.ready_since
    recovered = None
    unusable, unusable_seconds = 0, 0.0
    if ready_since is not None:
        unusable, unusable_seconds, recovered = whole_again(stage, ready_since)
    requests, events = stage.requests(), stage.events()
    longest = float(stage.service["environment"]["TTS_SIMULATED_SECONDS"])
    peaks = most_in_flight(events, longest)
    result = Result(
        name=chosen.name,
        text=chosen.text,
        sums=reckon(requests, events, stage.strikes),
        peak=max(peaks.values(), default=0),
        slots=max(stage.slots.values()),
        unusable=unusable,
        unusable_seconds=unusable_seconds if recovered else None,
        recovery_seconds=max(0.0, recovered - stage.cause_gone) if recovered else None,
        date=date,
        load=load,
        note=stage.note,
        trouble=trouble,
    )
    if recovered is None:
        stage.restart()
        wait_until(stage.idle_and_ready, READY_SECONDS, stage.states)
    return result


def whole_again(stage: Stage, ready_since: float) -> tuple[int, float, float | None]:
    """Use every slot at once, again and again until that succeeds.

    :returns: slots missing at first, for how long any was, and when the stage was whole (None: it did not come to it).
    """
    time.sleep(QUIET_SECONDS)
    wait_until(stage.idle_and_ready, READY_SECONDS)
    began = time.monotonic()
    missing = stage.capacity - stage.probe()
    if not missing:
        return 0, 0.0, ready_since
    while time.monotonic() < began + PROBE_SECONDS:
        time.sleep(QUIET_SECONDS)
        asked = time.monotonic()
        if stage.probe() == stage.capacity:
            return missing, asked - began, asked
    return missing, time.monotonic() - began, None

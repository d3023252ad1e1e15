"""Runs rows: each on a fleet that is whole, followed by the reckoning and the question whether it is whole again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

from ..operations import wait_until
from .bed import GATEWAY, PROBE_SECONDS, Fleet, Watch
from .reckoning import Reckoning, most_in_flight, reckon

READY_SECONDS = 120
QUIET_SECONDS = 1.5
"""Longer than an inference: work that outlives its client has ended."""

Act = Callable[[Fleet], None]


@dataclass(frozen=True)
class Row:
    """One fault: its name, what it is in a line, and the function that has it happen under load and takes it away."""

    name: str
    text: str
    act: Act


ROWS: dict[str, Row] = {}


def row(text: str) -> Callable[[Act], Act]:
    """Register a function as the row of its name."""

    def register(act: Act) -> Act:
        ROWS[act.__name__] = Row(act.__name__, text, act)
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


def run(fleet: Fleet, chosen: Row) -> Result:
    """Have one fault happen; the fleet is whole before and, by force if need be, after."""
    fleet.begin()
    date, load = datetime.now(timezone.utc).isoformat(timespec="minutes"), round(os.getloadavg()[0], 1)
    trouble = ""
    with Watch(fleet) as watch:
        try:
            chosen.act(fleet)
            wait_until(lambda: watch.ready_since is not None, READY_SECONDS, fleet.states)
        except Exception as error:  # the rows after this one are worth having too
            trouble = f"{type(error).__name__}: {error}"
        ready_since = watch.ready_since
    recovered = None
    unusable, unusable_seconds = 0, 0.0
    if ready_since is not None:
        unusable, unusable_seconds, recovered = whole_again(fleet, ready_since)
    requests, events = fleet.requests(), fleet.events()
    longest = float(fleet.service["environment"]["TTS_SIMULATED_SECONDS"])
    peaks = most_in_flight(events, longest)
    result = Result(
        name=chosen.name,
        text=chosen.text,
        sums=reckon(requests, events, fleet.strikes),
        peak=max(peaks.values(), default=0),
        slots=max(fleet.slots.values()),
        unusable=unusable,
        unusable_seconds=unusable_seconds if recovered else None,
        recovery_seconds=max(0.0, recovered - fleet.cause_gone) if recovered else None,
        date=date,
        load=load,
        note=fleet.note,
        trouble=trouble,
    )
    if recovered is None:
        restart(fleet)
    return result


def whole_again(fleet: Fleet, ready_since: float) -> tuple[int, float, float | None]:
    """Use every slot at once, again and again until that succeeds.

    :returns: slots missing at first, for how long any was, and when the fleet was whole (None: it did not come to it).
    """
    time.sleep(QUIET_SECONDS)
    wait_until(fleet.idle_and_ready, READY_SECONDS)
    began = time.monotonic()
    missing = fleet.capacity - fleet.probe()
    if not missing:
        return 0, 0.0, ready_since
    while time.monotonic() < began + PROBE_SECONDS:
        time.sleep(QUIET_SECONDS)
        asked = time.monotonic()
        if fleet.probe() == fleet.capacity:
            return missing, asked - began, asked
    return missing, time.monotonic() - began, None


def restart(fleet: Fleet) -> None:
    """Give the next row a whole fleet by an operator's means of last resort."""
    print("(nginx is restarted, and the fleet rolled out) ", end="", file=sys.stderr, flush=True)
    fleet.sh(GATEWAY, "systemctl restart nginx")
    fleet.operator.inventory.restore()
    fleet.operator.play("site")
    wait_until(fleet.idle_and_ready, READY_SECONDS, fleet.states)

"""When an instance is taken out for its failures, and for how long: a state machine without clock, file or loop."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True)
class Trip:
    """An instance's last removal from service, as its next process finds it."""

    reason: str
    """Why it was taken out, for people."""
    count: int
    """How many times in a row it has been, from 1."""
    at: float
    """When, in Unix time."""

    @property
    def pause_seconds(self) -> float:
        """How long it stays out: 5 s at first, twice as long each time, at most 5 minutes."""
        # Six doublings of 5 s are past the longest pause; without a bound a count from a file could overflow.
        return min(FIRST_PAUSE_SECONDS * 2 ** min(self.count - 1, 6), LONGEST_PAUSE_SECONDS)

    def seconds_left(self, now: float) -> float:
        """How much of the pause is left at the Unix time `now`: never more than all of it, though the clock stepped."""
        return min(max(self.at + self.pause_seconds - now, 0.0), self.pause_seconds)


class Breaker:
    """Counts failed requests in a row; at `limit`, or at the first one on probation, the instance is to be taken out.

    It is on probation from the trip of an earlier process until it has done one thing well.
    """

    def __init__(self, limit: int, last_trip: Trip | None = None) -> None:
        """Start after `last_trip`, if the process before was taken out."""
        self.failures = 0
        """Failed requests in a row so far."""
        self.last_trip = last_trip
        """Why this or an earlier process was taken out, until that is forgotten."""
        self._limit = limit
        self._tripped = False

    def succeed(self) -> bool:
        """Note a good request; True when with it an earlier trip is forgotten. Once tripped, only a restart helps."""
        if self._tripped:
            return False
        self.failures = 0
        forgotten = self.last_trip is not None
        self.last_trip = None
        return forgotten

    def fail(self) -> bool:
        """Note a failed request; True when the instance is to be taken out now, by `trip`."""
        self.failures += 1
        return not self._tripped and self.failures >= (1 if self.last_trip else self._limit)

    def trip(self, reason: str, now: float) -> Trip:
        """Take the instance out at the Unix time `now`."""
        self._tripped = True
        self.last_trip = Trip(reason, self.last_trip.count + 1 if self.last_trip else 1, now)
        return self.last_trip

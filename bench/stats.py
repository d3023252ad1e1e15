"""The arithmetic of the benchmarks: plain functions of what was seen."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all are not above, interpolated between neighbours as numpy does."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Sample:
    """One measure in every round: its median, and the lowest and highest round as its noise."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The round in the middle."""
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        """The lowest round."""
        return min(self.rounds)

    @property
    def high(self) -> float:
        """The highest round."""
        return max(self.rounds)


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index: 1 when all got the same, 1/n when one got everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


@dataclass(frozen=True)
class Event:
    """A start or an end of work on one GPU: `running` is what ran there from `time` on."""

    time: float
    instance: str
    running: int


def busy_seconds(events: Iterable[Event], begin: float, end: float) -> float:
    """Seconds of work from `begin` to `end`, added up over all GPUs and slots."""
    by_instance: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.time):
        by_instance[event.instance].append(event)
    total = 0.0
    for course in by_instance.values():
        ends = [event.time for event in course[1:]] + [end]
        for event, until in zip(course, ends):
            total += event.running * max(0.0, min(until, end) - max(event.time, begin))
    return total


def most_running(events: Iterable[Event]) -> int:
    """The most that ran on one GPU at a time."""
    return max((event.running for event in events), default=0)

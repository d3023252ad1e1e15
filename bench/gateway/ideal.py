"""What no gateway without a queue can exceed, by calculation: one that takes no time, and clients who take none."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from bench.stats import Event

IDEAL = "without queue, ideal"


@dataclass
class Course:
    """What became of some users; times count from the first one's gap on."""

    events: list[Event] = field(default_factory=list)
    """What ran on the slots, all of them one instance."""
    served: int = 0
    refused: int = 0


def overload(gaps: Sequence[float], work: Sequence[float], pause: float, patience: float, slots: int) -> Course:
    """Users who come one after the other with these gaps and ask for so many seconds of work each.

    Who is refused comes again after `pause` seconds: while `patience` lasts, and until the last user has come.
    """
    arrivals = list(accumulate(gaps))
    asking = [(time, time + patience, seconds) for time, seconds in zip(arrivals, work)]
    ends: list[float] = []
    course = Course()
    heapq.heapify(asking)
    while asking or ends:
        if ends and not (asking and asking[0][0] < ends[0]):
            course.events.append(Event(heapq.heappop(ends), "", len(ends)))
            continue
        now, until, seconds = heapq.heappop(asking)
        if len(ends) < slots:
            heapq.heappush(ends, now + seconds)
            course.events.append(Event(now, "", len(ends)))
            course.served += 1
            continue
        course.refused += 1
        if now + pause <= until and now < arrivals[-1]:
            heapq.heappush(asking, (now + pause, until, seconds))
    return course

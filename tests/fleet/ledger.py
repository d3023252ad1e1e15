"""What ran on the cards, as the service wrote it down there (TTS_LEDGER), independently of guard and gateway."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

SMOKE = "smoke"  # the request id of the guards' own trial requests, which no client sent


class Event(NamedTuple):
    """An inference began or ended. `monotonic` is CLOCK_MONOTONIC in seconds: one clock for all containers."""

    monotonic: float
    event: str
    request: str
    instance: str


def parse(lines: Iterable[str]) -> list[Event]:
    """Return the events of any number of ledgers in the order in which they happened."""
    records = (json.loads(line) for line in lines if line.strip())
    return sorted(Event(record["monotonic"], *(record[key] for key in Event._fields[1:])) for record in records)


def peaks(events: Iterable[Event]) -> dict[str, int]:
    """Return the most inferences that ever ran at once, by instance."""
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for event in events:
        running[event.instance] += 1 if event.event == "start" else -1
        most[event.instance] = max(most[event.instance], running[event.instance])
    return dict(most)


def runs(events: Iterable[Event]) -> Counter[str]:
    """Return how often each request was started on a card: more than once is one too many."""
    return Counter(event.request for event in events if event.event == "start")

"""Reconciles what clients got with what ran on the cards. Pure; all times are CLOCK_MONOTONIC, one for all hosts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..ledger import Event, peaks

OVERLOAD = "cluster_overload"
"""Type of the error that says: nothing was started, come again."""

APPS_OWN = "the app's own"
"""Stands for whatever a faulty app answered itself."""


@dataclass(frozen=True)
class Request:
    """What one client sent and got."""

    name: str
    began: float
    ended: float
    status: int | None = None
    """None without a whole answer."""
    error: str = ""
    """`type` of an error in JSON, or APPS_OWN; without an answer, why there is none."""
    left: bool = False
    """The client hung up on purpose."""


@dataclass(frozen=True)
class Strike:
    """Processes that work on requests were hit: killed, frozen or cut off. `until` is when no request went there."""

    began: float
    until: float
    instances: frozenset[str]
    """Whose work was hit; empty where it was the gateway's own."""

    def hit(self, request: Request, ran_on: str) -> bool:
        """Whether a request was in the hands of what was hit. One that left no trace on a card may have been."""
        in_flight = request.began <= self.until and request.ended >= self.began
        return in_flight and (not self.instances or not ran_on or ran_on in self.instances)


@dataclass(frozen=True)
class Reckoning:
    """The sums of a row, and of each sum that should be zero the requests behind it."""

    sent: int
    served: int
    refused: int
    failed_by_app: int
    left: int
    died_with_it: int
    lost: tuple[str, ...]
    twice: tuple[str, ...]
    wrong: tuple[str, ...]


def reckon(requests: Sequence[Request], events: Iterable[Event], strikes: Sequence[Strike]) -> Reckoning:
    """Judge every request by its answer, its inferences and the strikes that hit it."""
    ran: dict[str, list[str]] = {}
    for event in events:
        if event.event == "start":
            ran.setdefault(event.request, []).append(event.instance)
    sums: Counter[str] = Counter()
    found: dict[str, list[str]] = {"lost": [], "twice": [], "wrong": []}
    for request in requests:
        cards = ran.pop(request.name, [])
        if len(cards) > 1:
            found["twice"].append(f"{request.name} on {' and '.join(cards)}")
        verdict = judge(request, cards, strikes)
        sums[verdict] += 1
        if verdict in found:
            card = cards[0] if cards else "no card"
            found[verdict].append(f"{request.name}: {request.status or 'no answer'} {request.error}, ran on {card}")
    found["wrong"].extend(f"{name} ran, and nobody sent it" for name in ran)
    return Reckoning(
        sent=len(requests),
        **{kind: sums[kind] for kind in ("served", "refused", "failed_by_app", "left", "died_with_it")},
        **{kind: tuple(names) for kind, names in found.items()},
    )


def judge(request: Request, cards: Sequence[str], strikes: Sequence[Strike]) -> str:
    """One of the fields of Reckoning, but for `twice`."""
    if request.left:
        return "left"
    if request.error == APPS_OWN:
        return "failed_by_app"
    if request.status == 200:
        return "served" if cards else "wrong"
    if request.error == OVERLOAD:
        return "wrong" if cards else "refused"
    if any(strike.hit(request, cards[0] if cards else "") for strike in strikes):
        return "died_with_it"
    return "lost"


def most_in_flight(events: Iterable[Event], longest: float) -> Mapping[str, int]:
    """The most inferences that ever ran at once, by instance.

    One that left no end was killed, at the latest after `longest` seconds: until then it counts.
    """
    events = list(events)
    running: dict[tuple[str, str], Event] = {}
    killed: list[Event] = []
    for event in events:
        before = running.pop((event.request, event.instance), None)
        if event.event == "start":
            running[event.request, event.instance] = event
            killed.extend([before] if before else [])
    killed.extend(running.values())
    ends = [start._replace(monotonic=start.monotonic + longest, event="end") for start in killed]
    return peaks(sorted([*events, *ends]))

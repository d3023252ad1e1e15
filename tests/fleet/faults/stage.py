"""Where a row is played: a fleet with clients, what can be broken there, and what is asked afterwards."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..ledger import SMOKE, Event, parse
from .clients import POLITE, Clients, Manners
from .reckoning import Request, Strike

GARBAGE = (
    "import socketserver as s; s.TCPServer.allow_reuse_address = True; "
    "h = type('H', (s.StreamRequestHandler,), {{'handle': lambda r: (r.request.recv(9999), r.request.send(b'?'))}}); "
    "s.ThreadingTCPServer(('{address}', {port}), h).serve_forever()"
)
"""A program that answers whatever it is asked with something that is no HTTP."""


class Stage(ABC):
    """A gateway and three GPU hosts with two cards each, asked by clients."""

    def __init__(self, fleet: dict[str, Any], url: str, addresses: list[str]) -> None:
        """The fleet is up, its gateway at a URL; `addresses` are those that clients may use."""
        self.fleet = fleet
        (self.service,) = fleet["services"].values()
        self.capacity: int = fleet["capacity"]
        self.slots = {one["id"]: one["slots"] for one in fleet["instances"]}
        self.url = f"{url}{self.service['route']}audio-generate"
        self.addresses = addresses

    def begin(self) -> None:
        """Forget what the row before did."""
        self.strikes: list[Strike] = []
        self.clients_of_row: list[Clients] = []
        self.cause_gone = time.monotonic()
        self.note = ""
        self._before = set(self.ledger())

    # What a row does

    def instance(self, host: str, gpu: int) -> dict[str, Any]:
        """The instance of a card."""
        (found,) = [one for one in self.fleet["instances"] if (one["host"], one["gpu"]) == (host, gpu)]
        return dict(found)

    def instances(self, host: str) -> list[str]:
        """Ids of a host's instances."""
        return [one["id"] for one in self.fleet["instances"] if one["host"] == host]

    def clients(self, count: int, manners: Manners = POLITE, *, once: bool = False, first: int = 0) -> Clients:
        """So many clients, each at an address of its own as long as there are some."""
        addresses = [self.addresses[(first + number) % len(self.addresses)] for number in range(count)]
        clients = Clients(self.url, addresses, manners, once)
        self.clients_of_row.append(clients)
        return clients

    @contextmanager
    def load(self, count: int = 0, seconds_before: float = 2.0, seconds_after: float = 2.0) -> Iterator[None]:
        """Clients for all slots, or `count`, that ask before, during and after the block."""
        with self.clients(count or self.capacity):
            time.sleep(seconds_before)
            yield
            time.sleep(seconds_after)

    @contextmanager
    def strike(self, *instances: str) -> Iterator[None]:
        """The block hits processes that work, of these instances or, without any, of the gateway."""
        began = time.monotonic()
        yield
        self.strikes.append(Strike(began, time.monotonic(), frozenset(instances)))
        self.cause_gone = time.monotonic()

    def cause_is_gone(self) -> None:
        """From now on the fleet has to recover: the row has taken its fault away."""
        self.cause_gone = time.monotonic()

    @contextmanager
    def broken(self, break_it: Callable[[], object], mend: Callable[[], object]) -> Iterator[None]:
        """Have something broken for the length of a block."""
        break_it()
        try:
            yield
        finally:
            mend()
            self.cause_is_gone()

    @abstractmethod
    def reload_gateway(self) -> None:
        """Have the gateway take its configuration over again."""

    @abstractmethod
    def kill_gateway_workers(self, most: int | None = None) -> None:
        """Kill processes of the gateway that serve clients: all, or at most so many."""

    @abstractmethod
    def cut_gateway_power(self) -> None:
        """End all processes of the gateway at once, and have it start again."""

    @abstractmethod
    def kill_worker(self, instance: dict[str, Any]) -> None:
        """Kill the process that works for a card."""

    @abstractmethod
    def kill_master(self, instance: dict[str, Any]) -> None:
        """Kill the Gunicorn master of a card."""

    @abstractmethod
    def sick(self, host: str, gpu: int, fault: str) -> AbstractContextManager[None]:
        """Have a card's app fail in a way for the length of a block."""

    @abstractmethod
    def garbled(self, host: str, gpu: int) -> AbstractContextManager[None]:
        """Have GARBAGE listen in place of a card's program for the length of a block."""

    @abstractmethod
    def frozen(self, host: str) -> AbstractContextManager[None]:
        """Have no process of a host go on for the length of a block."""

    @abstractmethod
    def wait_until_out(self, *instances: str) -> None:
        """Return once the gateway is known to send none of these a request."""

    # What is asked after a row

    def requests(self) -> list[Request]:
        """All that clients sent in this row."""
        return [request for clients in self.clients_of_row for request in clients.requests]

    def events(self) -> list[Event]:
        """All that ran on cards in this row for clients."""
        events = parse(line for line in self.ledger() if line not in self._before and line.endswith("}"))
        return [event for event in events if event.request != SMOKE]

    def probe(self) -> int:
        """Ask for every slot at once; return how many answered."""
        clients = self.clients(self.capacity, once=True)
        with clients:
            pass
        return sum(request.status == 200 for request in clients.requests)

    @abstractmethod
    def ledger(self) -> Iterable[str]:
        """The lines of all cards' ledgers."""

    @abstractmethod
    def states(self) -> dict[str, str]:
        """State by instance, as the gateway tells it; empty while it cannot."""

    @abstractmethod
    def idle_and_ready(self) -> bool:
        """Whether the gateway tells that all slots are there and free."""

    @abstractmethod
    def restart(self) -> None:
        """Make the fleet whole by an operator's means of last resort."""

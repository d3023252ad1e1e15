"""Clients: a single one that times each answer closely, and crowds that ask, are refused and come again."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle

from bench.gateway.fleet import NETWORK, ROUTE

ATTEMPT_SECONDS = 30
REFUSALS = (429, 503)


def request(path: str, *, keep: bool = False) -> bytes:
    """A small POST for the service."""
    connection = "keep-alive" if keep else "close"
    head = f"POST {ROUTE}{path} HTTP/1.1\r\nHost: gateway\r\nConnection: {connection}\r\nContent-Length: 2\r\n\r\n{{}}"
    return head.encode()


@dataclass(frozen=True)
class Answer:
    """What one request got; times are seconds of CLOCK_MONOTONIC. `status` is 0 where the connection broke."""

    status: int
    began: float
    ended: float
    retry_after: float | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


class Probe:
    """One client that asks one request after the other over plain blocking sockets: what it adds itself is least."""

    def __init__(self, *places: tuple[str, int], keep: bool = True) -> None:
        """Ask these addresses and ports in turn, over a connection to each that is kept or a new one each time."""
        self._places = cycle(places)
        self._keep = keep
        self._connections: dict[tuple[str, int], socket.socket] = {}

    def whole(self, path: str) -> float:
        """Seconds from sending a request, or from connecting for it, to its whole answer."""
        began = time.perf_counter()
        status, _ = self._ask(path)
        seconds = time.perf_counter() - began
        _expect(200, status)
        return seconds

    def first_byte(self, path: str) -> float:
        """Seconds from sending a request to the first byte of the answer's body."""
        began = time.perf_counter()
        status, first = self._ask(path)
        _expect(200, status)
        return first - began

    def refusal(self, path: str) -> float:
        """Seconds from connecting, as a client that comes anew does, to a whole refusal."""
        self.close()
        began = time.perf_counter()
        status, _ = self._ask(path)
        seconds = time.perf_counter() - began
        self.close()
        _expect(503, status)
        return seconds

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _ask(self, path: str) -> tuple[int, float]:
        """Return the status, and when the body's first byte was here."""
        place = next(self._places)
        if place not in self._connections:
            self._connections[place] = socket.create_connection(place, timeout=ATTEMPT_SECONDS)
            self._connections[place].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._connections[place]
        connection.sendall(request(path, keep=self._keep))
        received, first = b"", 0.0
        while True:
            piece = connection.recv(65536)
            if not piece:
                raise ConnectionError(f"cut after {received[-200:]!r}")
            received += piece
            head, blank, body = received.partition(b"\r\n\r\n")
            if body and not first:
                first = time.perf_counter()
            if blank and _complete(head.lower(), body):
                if b"connection: close" in head.lower():
                    self._connections.pop(place).close()
                return int(head[9:12]), first


def _complete(head: bytes, body: bytes) -> bool:
    length = re.search(rb"content-length: *(\d+)", head)
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


def _expect(wanted: int, status: int) -> None:
    if status != wanted:
        raise RuntimeError(f"status {status} where {wanted} was expected")


Pause = Callable[[Answer], float]
"""How long a client waits after a refusal."""


def as_told(answer: Answer) -> float:
    """Wait what Retry-After says, or a second where nothing is said."""
    return 1.0 if answer.retry_after is None else answer.retry_after


def naive(_: Answer) -> float:
    """Ask again after a fifth of a second, whatever was said."""
    return 0.2


BEHAVIOURS: dict[str, Pause] = {"as told": as_told, "naive": naive}


async def attempt(port: int, client: str, path: str) -> Answer:
    """Ask once, over a connection of its own from the address `client`."""
    began = time.monotonic()
    status, retry_after = 0, None
    try:
        async with asyncio.timeout(ATTEMPT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(client, 0))
            writer.write(request(path))
            received = await reader.read(-1)
            writer.close()
        status = int(received[9:12])
        told = re.search(rb"\r\nRetry-After: *(\d+)\r\n", received, re.IGNORECASE)
        retry_after = float(told[1]) if told else None
    except (OSError, TimeoutError, ValueError):
        pass
    return Answer(status, began, time.monotonic(), retry_after)


@dataclass
class Crowd:
    """Many clients of one gateway, each with an address of its own, and all that they were answered."""

    port: int
    pause: Pause
    patience: float = 5.0
    """Seconds after which a client that was refused does not come again."""
    answers: list[Answer] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Seconds that each user who was served has waited before his work, refusals and pauses included."""

    def __post_init__(self) -> None:
        """Number the clients."""
        self._numbers = count()
        self._over = False

    async def ask(self, seconds: float, client: str | None = None) -> bool:
        """One user: ask for work of so many seconds until it is done; False where patience ended before."""
        began = time.monotonic()
        client = client or self.address()
        while True:
            answer = await attempt(self.port, client, f"generate?seconds={seconds:.3f}")
            self.answers.append(answer)
            if answer.status == 200:
                self.waits.append(answer.ended - began - seconds)
            if answer.status not in REFUSALS:
                return answer.status == 200
            pause = self.pause(answer)
            if self._over or time.monotonic() + pause > began + self.patience:
                return False
            await asyncio.sleep(pause)

    async def arrive(self, gaps: Sequence[float], work: Sequence[float], *, close: bool = False) -> None:
        """Users who come one after the other with these gaps, whoever is served or not; return when all are gone.

        When the last one has come and it is time to `close`, those who are refused do not come again.
        """
        async with asyncio.TaskGroup() as group:
            due = time.monotonic()
            for gap, seconds in zip(gaps, work):
                due += gap
                await asyncio.sleep(due - time.monotonic())
                group.create_task(self.ask(seconds))
            self._over = close

    async def compete(self, clients: int, seconds: float, work: random.Random) -> list[int]:
        """Clients who always want one more, for so many seconds; return how many answers each got in that time."""
        end = time.monotonic() + seconds
        served = [0] * clients

        async def go_on(number: int) -> None:
            client = self.address()
            while time.monotonic() < end:
                if await self.ask(work.uniform(0.4, 0.6), client) and time.monotonic() < end:
                    served[number] += 1

        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(go_on(number))
            await asyncio.sleep(seconds)
            self._over = True
        return served

    def address(self) -> str:
        """The next client's address."""
        number = next(self._numbers)
        return f"{NETWORK}.{200 + number // 250 % 50}.{1 + number % 250}"

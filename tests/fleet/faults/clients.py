"""Clients with manners of their own: who hangs up, reads or uploads slowly, asks for a stream or for the worst."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from ..background import Background
from .reckoning import APPS_OWN, Request

TEXT = "故障"
PATIENCE_SECONDS = 60.0
MEGABYTE = 1 << 20
TICK_SECONDS = 0.1


@dataclass(frozen=True)
class Manners:
    """How a client asks."""

    stream: bool = False
    leaves_after: float | None = None
    """Seconds after which it hangs up."""
    upload_megabytes: int = 0
    upload_seconds: float = 0
    """How long it takes over an upload of that size: JSON may end in white space."""
    answer_megabytes: int = 0
    read_seconds: float = 0
    """How long it takes to read an answer that is so much longer."""
    headers: Mapping[str, str] = field(default_factory=dict)
    pause: float = 0.2
    """Seconds between an answer and its next request."""


POLITE = Manners()


class Clients(Background):
    """Clients that ask for the length of a `with` block; `requests` is what they sent and got.

    At its end every client ends its request.
    """

    _numbers = itertools.count()

    def __init__(self, url: str, addresses: Sequence[str], manners: Manners, once: bool = False) -> None:
        """One client for each of `addresses`, all with the same manners; those that ask `once` ask all at a time."""
        super().__init__()
        self.requests: list[Request] = []
        self._url, self._addresses, self._manners, self._once = url, addresses, manners, once

    def work(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, address in enumerate(self._addresses):
                # Not all at a time: whatever is struck, some are at work there.
                delay = 0 if self._once else number / len(self._addresses)
                group.create_task(self._ask_on(address, delay))

    async def _ask_on(self, address: str, delay: float) -> None:
        await asyncio.sleep(delay)
        while True:
            self.requests.append(await ask(self._url, address, f"r{next(self._numbers)}", self._manners))
            if self._once or self.ending.is_set():
                return
            await asyncio.sleep(self._manners.pause)


async def ask(url: str, address: str, name: str, manners: Manners) -> Request:
    """Send one request on a connection of its own, and say what came of it."""
    headers = {"Content-Type": "application/json", "X-Simulated-Name": name, **manners.headers}
    body: bytes | AsyncIterator[bytes] = json.dumps({"text": TEXT, "stream": manners.stream}).encode()
    if manners.upload_megabytes:
        headers["Content-Length"] = str(manners.upload_megabytes * MEGABYTE)
        body = _slowly(body, manners)
    if manners.answer_megabytes:
        headers["X-Simulated-Megabytes"] = str(manners.answer_megabytes)
    # Not verifying what is no TLS spares loading the machine's certificates for every request.
    transport = httpx.AsyncHTTPTransport(local_address=address, verify=False)
    async with httpx.AsyncClient(transport=transport, trust_env=False, timeout=PATIENCE_SECONDS) as session:
        began, own = time.monotonic(), ""
        try:
            async with (
                asyncio.timeout(manners.leaves_after),
                session.stream("POST", url, content=body, headers=headers) as answer,
            ):
                own = APPS_OWN if "x-simulated" in answer.headers else ""
                content = await _read(answer, manners)
                error = own or (_error(content) if answer.status_code != 200 else "")
        except TimeoutError:
            return Request(name, began, time.monotonic(), left=True)
        except httpx.HTTPError as failure:
            return Request(name, began, time.monotonic(), error=own or type(failure).__name__)
        return Request(name, began, time.monotonic(), answer.status_code, error)


async def _slowly(start: bytes, manners: Manners) -> AsyncIterator[bytes]:
    """A body of white space after its start, in equal steps."""
    size = manners.upload_megabytes * MEGABYTE
    step = max(1, int(size * TICK_SECONDS / max(manners.upload_seconds, TICK_SECONDS)))
    yield start
    for sent in range(len(start), size, step):
        await asyncio.sleep(TICK_SECONDS)
        yield b" " * min(step, size - sent)


async def _read(answer: httpx.Response, manners: Manners) -> bytes:
    """The answer's beginning; the whole of it is read, in small sips where the client is slow."""
    begin = b""
    size = manners.answer_megabytes * MEGABYTE
    sip = max(1, int(size * TICK_SECONDS / manners.read_seconds)) if manners.read_seconds else None
    async for piece in answer.aiter_raw(sip):
        begin = begin or piece
        if sip:
            await asyncio.sleep(TICK_SECONDS)
    return begin


def _error(content: bytes) -> str:
    """Type of an error in JSON."""
    try:
        return str(json.loads(content)["error"]["type"])
    except (ValueError, KeyError, TypeError):
        return f"no error document: {content[:60]!r}"

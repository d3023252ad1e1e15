"""Many requests at once, each from a client address of its own choice."""

import asyncio
import ipaddress
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from testbed.shell import provide, run

from .background import Background


@contextmanager
def addresses_of_clients(gateway: str) -> Iterator[list[str]]:
    """Lend this machine twenty addresses from which the gateway at an address sees as many clients."""
    provide({"ip": "iproute2"})
    # The bridge of the test bed's network; its hosts are numbered from the bottom.
    (route,) = json.loads(run("ip", "-json", "route", "get", gateway))
    network = ipaddress.ip_network(f"{gateway}/24", strict=False)
    addresses = [str(network[200 + number]) for number in range(20)]
    for address in addresses:
        run("ip", "address", "replace", f"{address}/32", "dev", route["dev"])
    try:
        yield addresses
    finally:
        for address in addresses:
            run("ip", "address", "delete", f"{address}/32", "dev", route["dev"])


@dataclass(frozen=True)
class Answer:
    """What one client got: `status` is None where it hung up or was cut off. Times are seconds since all began."""

    client: str
    status: int | None
    headers: Mapping[str, str]
    body: bytes
    began: float
    ended: float

    @property
    def request(self) -> str:
        """The id that the gateway gave the request, for looking it up in logs and ledger."""
        return self.headers["X-Request-ID"]

    @property
    def seconds(self) -> float:
        """How long the client waited."""
        return self.ended - self.began


def post_at_once(
    url: str,
    clients: Sequence[str],
    json: Mapping[str, Any],
    *,
    key: str = "",
    hang_up_after: float | None = None,
    seconds: float = 60,
) -> list[Answer]:
    """Post `json` once for each entry of `clients` (addresses of this machine; repeat one to ask twice), all at once.

    Each request has a connection of its own, and bears the API key where one is given. Those without an answer after
    `hang_up_after` seconds are closed; `seconds` is how long the test waits at most.
    """
    return asyncio.run(_post_at_once(url, clients, json, key, hang_up_after, seconds))


async def _post_at_once(
    url: str,
    clients: Sequence[str],
    json: Mapping[str, Any],
    key: str,
    hang_up_after: float | None,
    seconds: float,
    cut: tuple[type[Exception], ...] = (),
) -> list[Answer]:
    bearer = {"Authorization": f"Bearer {key}"} if key else {}
    start = asyncio.Event()
    zero = time.monotonic()

    async def post(client: str) -> Answer:
        # Not verifying spares loading the machine's certificates for every request; most are no TLS anyway.
        transport = httpx.AsyncHTTPTransport(local_address=client, verify=False)
        async with httpx.AsyncClient(transport=transport, trust_env=False, timeout=seconds) as session:
            await start.wait()
            began = time.monotonic() - zero
            status, headers, body = None, httpx.Headers(), b""
            try:
                async with asyncio.timeout(hang_up_after):
                    answer = await session.post(url, json=json, headers=bearer)
                    status, headers, body = answer.status_code, answer.headers, answer.content
            except (TimeoutError, *cut):
                pass
            return Answer(client, status, headers, body, began, time.monotonic() - zero)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(post(client)) for client in clients]
        # All clients are made before the first one asks: making one takes longer than an answer.
        await asyncio.sleep(0.1)
        start.set()
    return [task.result() for task in tasks]


class SteadyLoad(Background):
    """Clients that ask one after the other for the length of a `with` block; `answers` is all that they got.

    At its end every client ends its request; none is given up, unless `patience` says after how many seconds: then
    a connection may also be cut. Times are those of `time.monotonic()`.
    """

    def __init__(
        self,
        url: str,
        clients: Sequence[str],
        json: Mapping[str, Any],
        *,
        key: str = "",
        pause: float = 0.1,
        patience: float | None = None,
    ) -> None:
        super().__init__()
        self.answers: list[Answer] = []
        self._url, self._clients, self._json, self._key, self._pause = url, clients, json, key, pause
        self._patience, self._cut = patience, () if patience is None else (httpx.TransportError,)

    def work(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for client in self._clients:
                group.create_task(self._ask_on(client))

    async def _ask_on(self, client: str) -> None:
        while not self.ending.is_set():
            zero = time.monotonic()
            how = (self._key, self._patience, 60, self._cut)
            (answer,) = await _post_at_once(self._url, [client], self._json, *how)
            self.answers.append(replace(answer, began=zero + answer.began, ended=zero + answer.ended))
            await asyncio.sleep(self._pause)

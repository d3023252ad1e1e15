"""A simulated GPU instance: counts on its own side what the gateway lets through, and fails as told."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable

STATUS_PATH = "/_slot_guard/status"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


class SimulatedGpu:
    """An HTTP server on one address and port; ``answer`` works on a request and returns the bytes to send.

    ``stream`` is sent before it, a chunk every ``seconds``. Its guard says that it is in ``state``, and whatever is
    ``told`` besides.
    """

    def __init__(self, address: str, port: int) -> None:
        self.address, self.port = address, port
        self.seconds = 0.3
        self.answer: Callable[[], Awaitable[bytes]] = self.work
        self.stream: list[bytes] = []
        self.state = "ready"
        self.told: dict[str, object] = {}
        self.running = self.peak = self.started = 0
        self.bodies: list[int] = []
        self.headers: dict[str, str] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, self.address, self.port)

    async def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server:
            self._server.close()
            self._server = None

    async def work(self) -> bytes:
        """Take ``seconds``, as an inference that cannot be interrupted does."""
        await asyncio.sleep(self.seconds)
        return OK

    def status(self) -> bytes:
        """Say what a guard says."""
        counts = {"in_flight": self.running, "served": self.started - self.running, "refused": 0, "failed": 0}
        counts |= {"waiting": 0, "started": 1767225600}
        body = json.dumps(
            {"state": self.state, "since": "2026-01-01T00:00:00+00:00", "version": "f00d", **counts, **self.told}
        )
        return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            pairs = [line.split(": ", 1) for line in head.split("\r\n")[1:] if line]
            headers = {name.lower(): value for name, value in pairs}
            if head.split()[1] == STATUS_PATH:
                writer.write(self.status())
                await writer.drain()
                return
            self.headers = headers
            body = await reader.readexactly(int(self.headers.get("content-length", 0)))
            self.bodies.append(len(body))
            self.started += 1
            self.running += 1
            self.peak = max(self.peak, self.running)
            try:
                for chunk in self.stream:
                    writer.write(chunk)
                    await asyncio.sleep(self.seconds)
                writer.write(await self.answer())
                await writer.drain()
            finally:
                self.running -= 1

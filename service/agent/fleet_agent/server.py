"""The agent's HTTP server: a few documents and a stream over a unix socket, for the gateway alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path

from fleet_agent import viewers
from fleet_agent.edition import Reply
from fleet_agent.viewers import Viewers

PATIENCE_SECONDS = 2.0
"""How long a client may take to ask, and to take the answer."""

MAX_REQUEST = 16_384

NOT_FOUND = Reply(404, "text/plain; charset=utf-8", "not found\n")
FULL = Reply(503, "text/plain; charset=utf-8", f"{viewers.MOST} watch already\n")


class StatusServer:
    """Answers GET requests for fixed paths at a unix socket that everybody on this host may connect to."""

    def __init__(self, path: Path, replies: Mapping[str, Callable[[], Reply]], streams: Mapping[str, Viewers]) -> None:
        """Serve `replies` and `streams` (by path) at the socket `path`, once `ensure` was called."""
        self._path = path
        self._replies = replies
        self._streams = streams
        self._server: asyncio.AbstractServer | None = None
        self._bound: tuple[int, int] | None = None

    async def ensure(self) -> None:
        """Listen, unless it does; OSError where it cannot, for instance before the directory is made."""
        if self._bound and self._bound == self._found():
            return
        self.close()
        # Made complete under another name, it takes the place of a dead agent's socket at once.
        unfinished = self._path.with_name(f".{self._path.name}")
        unfinished.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        try:
            listening.bind(str(unfinished))
            unfinished.chmod(0o666)
            self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=MAX_REQUEST)
            unfinished.replace(self._path)
        except OSError:
            listening.close()
            raise
        self._bound = self._found()

    def close(self) -> None:
        """Stop listening, and end what still streams."""
        for stream in self._streams.values():
            stream.close()
        if self._server is not None:
            self._server.close()
            self._server = None
        self._bound = None

    def _found(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            path = await asyncio.wait_for(_path_asked(reader), PATIENCE_SECONDS)
            stream = self._streams.get(path)
            if stream is not None and len(stream) < viewers.MOST:
                await stream.serve(reader, writer)
            else:
                reply = FULL if stream is not None else self._replies.get(path, lambda: NOT_FOUND)()
                await asyncio.wait_for(_answer(reply, reader, writer), PATIENCE_SECONDS)
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.TimeoutError):
            pass  # whoever asked is gone, slow or no HTTP client
        finally:
            writer.transport.abort()


async def _path_asked(reader: asyncio.StreamReader) -> str:
    """The path of a GET request; empty where it is no such request."""
    head = await reader.readuntil(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].decode("ascii", errors="replace").split(" ")
    return words[1].partition("?")[0] if len(words) == 3 and words[0] == "GET" else ""


async def _answer(reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = reply.text.encode()
    lines = (
        f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}",
        f"Content-Type: {reply.content_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    )
    writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode() + body)
    await writer.drain()
    writer.write_eof()
    await reader.read(1)  # until the client has closed: an abort would throw away what it has not read

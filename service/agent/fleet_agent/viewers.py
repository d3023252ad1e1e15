"""Who watches the cluster: a stream of server-sent events each, bounded whatever they do."""

from __future__ import annotations

import asyncio

from fleet_agent.edition import Edition

MOST = 64
"""So many may watch at a time."""

STREAM_SECONDS = 60.0
"""Then a stream ends, and its viewer opens another: a worker of nginx that a reload replaced stays for its streams."""

PATIENCE = 10
"""A viewer that has taken nothing for so many events is dropped."""

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"


class Viewers:
    """Streams that all tell the same.

    Nothing waits for a viewer, and none is sent anything while it has not taken what it was sent before: a slow one
    misses events, and is told the whole once it is back. So each costs at most one document of memory.
    """

    def __init__(self, edition: Edition) -> None:
        """Nobody watches yet; `edition` is what the first one is told."""
        self._edition = edition
        self._missed: dict[asyncio.StreamWriter, int] = {}

    def __len__(self) -> int:
        """How many watch."""
        return len(self._missed)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Tell a viewer all, and then what `tell` is given, until it leaves, is dropped, or its time is over."""
        writer.write(HEAD + self._edition.whole)
        self._missed[writer] = 0
        try:
            await asyncio.wait_for(reader.read(1), STREAM_SECONDS)
        finally:
            del self._missed[writer]

    def tell(self, edition: Edition) -> None:
        """Send everybody what is new."""
        self._edition = edition
        for writer, missed in self._missed.items():
            if writer.transport.get_write_buffer_size() == 0:
                writer.write(edition.whole if missed else edition.change)
                self._missed[writer] = 0
            elif missed < PATIENCE:
                self._missed[writer] = missed + 1
            else:
                writer.transport.abort()

    def close(self) -> None:
        """End all streams."""
        for writer in self._missed:
            writer.transport.abort()

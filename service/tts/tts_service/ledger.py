"""A ledger of inferences, kept where they run: what the tests count by, independently of guard and gateway."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Ledger:
    """Appends one JSON line per start and end of an inference: event, request, instance, running, wall, monotonic.

    `running` counts this process's inferences after the event, `wall` is seconds since 1970, `monotonic` the seconds
    of CLOCK_MONOTONIC, which all processes of a machine share. Several processes may append to one file.
    """

    def __init__(self, path: str, instance: str) -> None:
        """Append to `path` on behalf of `instance`; an empty path keeps no ledger."""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if path else None
        self._instance = instance
        self._running = 0
        # Amid a record a garbage collection may end an abandoned inference and record that too, in the same thread.
        self._lock = threading.RLock()

    @contextmanager
    def inference(self, request: str) -> Iterator[None]:
        """Record the inference that the body of the `with` runs for the request with this X-Request-ID."""
        self._record("start", request, +1)
        try:
            yield
        finally:
            self._record("end", request, -1)

    def _record(self, event: str, request: str, change: int) -> None:
        if self._file is None:
            return
        with self._lock:
            self._running += change
            line = {
                "event": event,
                "request": request,
                "instance": self._instance,
                "running": self._running,
                "wall": time.time(),
                "monotonic": time.monotonic(),
            }
            # One write to a file opened with O_APPEND: lines of several processes never mix.
            os.write(self._file, json.dumps(line).encode() + b"\n")

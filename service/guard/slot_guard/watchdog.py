"""A watchdog for apps that block their event loop, where they stop every other request and all health checks."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from pathlib import Path

logger = logging.getLogger("slot_guard")

BLOCKED_SECONDS = 1.0
"""A loop that was held for this long is reported."""

_BEAT_SECONDS = 0.1
_PATIENCE_SECONDS = 0.8


class LoopWatchdog:
    """A thread that asks the event loop for a sign of life and says which line keeps it from giving one.

    Signs are asked for every 0.1 s and waited for 0.8 s: a block of 1 s is seen, one below 0.8 s never.
    """

    def __init__(self, app: str) -> None:
        """Watch on behalf of `app`, the name that the warning gives."""
        self.blocks = 0
        """Blocks seen so far."""
        self.longest_seconds = 0.0
        """The longest of them."""
        self.stack = ""
        """Where the loop's thread was in the first block."""
        self._place = ""
        self._app = app
        self._stopped = threading.Event()

    @property
    def warning(self) -> str:
        """What it saw, in a line; empty when that is nothing."""
        if not self.blocks:
            return ""
        times = "once" if self.blocks == 1 else f"{self.blocks} times"
        return f"blocks its event loop, {times}, for {self.longest_seconds:.1f} s at worst, in {self._place}"

    def start(self) -> None:
        """Watch the running event loop until `stop`."""
        loop = asyncio.get_running_loop()
        arguments = (loop, threading.get_ident())
        threading.Thread(target=self._watch, args=arguments, name="slot_guard-watchdog", daemon=True).start()

    def stop(self) -> None:
        """End the thread within a second."""
        self._stopped.set()

    def _watch(self, loop: asyncio.AbstractEventLoop, loop_thread: int) -> None:
        while not self._stopped.wait(_BEAT_SECONDS):
            alive = threading.Event()
            asked = time.monotonic()
            try:
                loop.call_soon_threadsafe(alive.set)
            except RuntimeError:  # the loop is closed
                return
            if alive.wait(_PATIENCE_SECONDS):
                continue
            if time.monotonic() - asked > BLOCKED_SECONDS:
                continue  # this thread was held up as well: a frozen process or the GIL, not the loop alone
            self._report(loop_thread)
            alive.wait()
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - asked)

    def _report(self, loop_thread: int) -> None:
        self.blocks += 1
        frame = sys._current_frames().get(loop_thread)
        if self.stack or frame is None:
            return
        self._place = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"
        self.stack = "".join(traceback.format_stack(frame, limit=12))
        logger.warning(
            "%s BLOCKS ITS EVENT LOOP: for %g s nothing else was served, health checks included. Its slots cannot be "
            "used at once. Make the handler `def` instead of `async def`, or await asyncio.to_thread(...). "
            "This is said once. The loop is stuck here:\n%s",
            self._app,
            BLOCKED_SECONDS,
            self.stack,
        )

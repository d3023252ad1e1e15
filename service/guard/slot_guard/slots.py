"""The slots of a GPU: who holds one, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any


class Slots:
    """A fixed number of slots, used from one event loop."""

    def __init__(self, total: int) -> None:
        """Start with `total` free slots."""
        self.total = total
        self.in_flight = 0
        self._all_free = asyncio.Event()
        self._all_free.set()

    def take(self) -> Slot | None:
        """Take a slot, or None when all are held."""
        if self.in_flight >= self.total:
            return None
        self.in_flight += 1
        self._all_free.clear()
        return Slot(self._give_back)

    async def all_free(self) -> None:
        """Wait until no slot is held."""
        await self._all_free.wait()

    def _give_back(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self._all_free.set()


class Slot:
    """One request's slot: given back when the last of the pieces of work done for it is over."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        """Start with one piece of work, the app's own call; `give_back` is called once."""
        self._give_back = give_back
        self._pieces = 1

    def hold(self) -> bool:
        """Add a piece of work; False when the slot was given back already."""
        if self._pieces == 0:
            return False
        self._pieces += 1
        return True

    def release(self) -> None:
        """End a piece of work, in the event loop's thread."""
        self._pieces -= 1
        if self._pieces == 0:
            self._give_back()


current_slot: ContextVar[Slot | None] = ContextVar("current_slot", default=None)
"""The slot of the request that the running code works for."""


class SlotExecutor(ThreadPoolExecutor):
    """Default executor of an event loop whose jobs hold the slot of the request that started them.

    A thread cannot be cancelled: when the coroutine that awaits asyncio.to_thread() is, the GPU works on.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve `loop`, in which slots are released."""
        super().__init__(thread_name_prefix="slot_guard")
        self._loop = loop

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a job; its slot is held until it has run, or was cancelled before it began."""
        slot = current_slot.get()
        held = slot is not None and slot.hold()
        try:
            job = super().submit(fn, *args, **kwargs)
        except BaseException:
            if slot is not None and held:
                slot.release()
            raise
        if slot is not None and held:
            # Registered before asyncio registers its own callback: the piece ends before the awaiting code goes on.
            job.add_done_callback(lambda _: self._in_loop(slot.release))
        return job

    def _in_loop(self, callback: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

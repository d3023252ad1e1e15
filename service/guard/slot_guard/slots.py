"""The slots of a GPU: who holds one, until when, and who is next."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any


class Slots:
    """A fixed number of slots and of places to wait for one, used from one event loop.

    A slot that is given back goes straight to who has waited longest, so nobody who comes later can take it.
    """

    def __init__(self, total: int, queue: int = 0) -> None:
        """Start with `total` free slots and `queue` free places."""
        self.total = total
        self.queue = queue
        self.in_flight = 0
        self._waiting: list[tuple[float, int, asyncio.Future[Slot | None]]] = []
        self._arrivals = 0
        self._all_free = asyncio.Event()
        self._all_free.set()

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def take(self) -> Slot | None:
        """Take a slot, or None when all are held."""
        if self.in_flight >= self.total:
            return None
        self.in_flight += 1
        self._all_free.clear()
        return Slot(self._give_back)

    async def wait(self, since: float, until: float) -> Slot | None:
        """Take a slot in the order of `since`; None when there is no place, at `until`, or when sent away.

        Both are times of the loop. Who waits since a time before others' came from another GPU, which sent it away.
        """
        if slot := self.take():
            return slot
        loop = asyncio.get_running_loop()
        if self.waiting >= self.queue or until <= loop.time():
            return None
        turn: asyncio.Future[Slot | None] = loop.create_future()
        self._arrivals += 1
        place = (since, self._arrivals, turn)
        bisect.insort(self._waiting, place)
        try:
            await asyncio.wait([turn], timeout=until - loop.time())
        except asyncio.CancelledError:
            # The turn may have come in the same tick in which the client left.
            if turn.done() and (slot := turn.result()):
                slot.release()
            raise
        finally:
            if not turn.done():
                self._waiting.remove(place)
        return turn.result() if turn.done() else None

    def send_away(self) -> int:
        """Let all who wait go without a slot; return how many."""
        waiting, self._waiting = self._waiting, []
        for _, _, turn in waiting:
            turn.set_result(None)
        return len(waiting)

    def close_queue(self) -> None:
        """Let nobody wait any more."""
        self.queue = 0
        self.send_away()

    async def all_free(self) -> None:
        """Wait until no slot is held."""
        await self._all_free.wait()

    def _give_back(self) -> None:
        if self._waiting:
            _, _, turn = self._waiting.pop(0)
            turn.set_result(Slot(self._give_back))
            return
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


class Reservations:
    """Slots kept for requests whose turn has come, by request id, until they are here to work."""

    def __init__(self, seconds: float) -> None:
        """Keep each slot for so long: a client may leave after its turn has come."""
        self._seconds = seconds
        self._kept: dict[bytes, Slot] = {}

    def keep(self, request_id: bytes, slot: Slot) -> None:
        """Keep a slot for a request; one that was kept under this id is given back."""
        if earlier := self.claim(request_id):
            earlier.release()
        self._kept[request_id] = slot
        asyncio.get_running_loop().call_later(self._seconds, self._expire, request_id, slot)

    def claim(self, request_id: bytes) -> Slot | None:
        """The slot that is kept for a request, if there is one; the caller holds it then."""
        return self._kept.pop(request_id, None)

    def _expire(self, request_id: bytes, slot: Slot) -> None:
        if self._kept.get(request_id) is slot:
            del self._kept[request_id]
            slot.release()


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

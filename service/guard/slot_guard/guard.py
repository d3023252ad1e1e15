"""The guard itself: who is let in, who is told to go elsewhere, and what is known about the app."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from slot_guard import recycling
from slot_guard.admin import PREFIX, from_gateway, header, is_admin_path, may_ask, metrics_text, seconds_waited
from slot_guard.breaker import Breaker
from slot_guard.exchange import Exchange
from slot_guard.loading import Lifespan, import_app, load_in_thread
from slot_guard.logs import request_id
from slot_guard.messages import App, Receive, Scope, Send, error_json, reply, utc_now
from slot_guard.recycling import UNLIMITED, Wear, resident_megabytes
from slot_guard.settings import Settings
from slot_guard.slots import Reservations, Slot, SlotExecutor, Slots, current_slot
from slot_guard.trip_file import TripFile
from slot_guard.watchdog import LoopWatchdog

logger = logging.getLogger("slot_guard")

BOOT_ERROR = 3
"""Exit code of a worker that cannot boot: Gunicorn's arbiter then stops itself instead of starting another."""

FAREWELL_SECONDS = 2.0
"""How long an instance that was taken out goes on refusing before it exits.

The gateway's agent asks once a second: by then no request is on its way here to meet a closed connection, and the last
answers have left.
"""

REASON_CHARACTERS = 500
"""At most so much is kept of why an instance was taken out; an app's errors may quote whole inputs."""

SHUTDOWN_SECONDS = 10.0
"""How long an app that was taken out may take to shut down, which is to end its child processes."""

CLAIM_SECONDS = 2.0
"""How long a slot is kept for a request whose turn has come: that is one way from here to the gateway and back."""

STDERR = 2
"""Its descriptor, which an app cannot have replaced as it may sys.stderr."""

FINISHING_TICKS = 10
"""Turns of the event loop that an answered request is given to return before a new one is refused."""

REFUSALS = {
    "full": ("slots_full", 1, "Every slot of this GPU is in use / 该 GPU 的并发已满"),
    "loading": ("loading", 5, "The model is being loaded / 模型加载中"),
    "suspect": ("suspect", 5, "This GPU failed and is being restarted / 该 GPU 发生故障,正在重启"),
    "recycling": ("recycling", 5, "This GPU starts anew to free memory / 该 GPU 正在重启以释放内存"),
    "stopping": ("stopping", 5, "The service is stopping / 服务正在停止"),
    "failed": ("load_failed", 5, "The service could not be loaded / 服务加载失败"),
}
"""Why a request is not let in: error code, Retry-After in seconds, message."""


def exit_worker() -> None:
    """End the process so that Gunicorn stops and Supervisor starts anew, whatever threads the app has left behind."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(BOOT_ERROR)


class SlotGuard:
    """An ASGI app that runs another one with a fixed number of slots.

    A slot is held until the app has returned and every job that it left in the event loop's default executor has ended.
    A request counts as `failed` when the app raised, answered with a 5xx status, or left its answer unfinished or too
    short, while the client was still there; as `refused` when it was not let in; else as `served`.

    Who finds no free slot is refused at once. The gateway may then ask for a slot on behalf of a request; its answer
    comes when it is that one's turn and a slot is kept for it. Only while it waits for this answer does the gateway
    watch the client, so one that leaves frees its place, and one whose work runs does not free its slot.

    After too many failed requests in a row, or a bad answer to the smoke request, the instance is `suspect`: it refuses
    every request, ends with exit code 3 when its slots are free, and its next process waits before it tries again.

    An instance that has worn out is `recycling`: it leaves in the same way, but nothing has failed and nothing waits.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], App] | None = None,
        on_failure: Callable[[], None] = exit_worker,
    ) -> None:
        """Guard the app that `load` returns (default: the import of settings.app); it is called at lifespan startup.

        `on_failure` is called when the app could not be loaded, was taken out or has worn out.
        """
        self.settings = settings
        self.slots = Slots(settings.slots, settings.queue)
        self.state = "loading"
        self.since = utc_now()
        self.started = int(time.time())
        self.requests = {"served": 0, "refused": 0, "failed": 0}
        self._reserved = Reservations(CLAIM_SECONDS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._load = load or partial(import_app, settings.app)
        self._on_failure = on_failure
        self._trip_file = TripFile(settings.state_directory, settings.instance, settings.version)
        self._breaker = Breaker(settings.failure_limit, self._trip_file.load())
        self._leaving: asyncio.Task[None] | None = None
        self._wearing: asyncio.Task[None] | None = None
        self._worn_out = ""
        self._misfit = ""
        self._watchdog = LoopWatchdog(settings.app)
        self._running: dict[Exchange, asyncio.Task[None]] = {}
        self._app: App
        self._app_lifespan: Lifespan | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        request_id.set(header(scope, b"x-request-id").decode("latin-1") or "-")
        if is_admin_path(scope["path"]):
            await self._administer(scope, receive, send)
        elif slot := await self._admit(scope):
            await self._serve(slot, scope, receive, send)
        else:
            await self._refuse(scope, receive, send)

    def stop_soon(self) -> None:
        """Send away who waits for a slot, since this process is about to stop. A signal's handler may call this."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.slots.close_queue)

    def status(self) -> dict[str, Any]:
        """The status document of this instance.

        `reason` says why it is recycled, or why it was taken out until that is forgotten; `warning` what is wrong with
        one that serves.
        """
        trip = self._breaker.last_trip
        return {
            "instance": self.settings.instance,
            "version": self.settings.version,
            "app": self.settings.app,
            "state": self.state,
            "since": self.since,
            "started": self.started,
            "reason": self._worn_out or (trip and trip.reason),
            "warning": "; ".join(filter(None, (self._watchdog.warning, self._misfit))) or None,
            "consecutive_failures": self._breaker.failures,
            "trips": trip.count if trip else 0,
            "slots": self.slots.total,
            "in_flight": self.slots.in_flight,
            "queue": self.settings.queue,
            "waiting": self.slots.waiting,
            **self.requests,
            "loop_blocked": {
                "count": self._watchdog.blocks,
                "longest_seconds": round(self._watchdog.longest_seconds, 3),
                "stack": self._watchdog.stack,
            },
        }

    def _enter(self, state: str) -> None:
        self.state = state
        self.since = utc_now()
        logger.info("%s is %s", self.settings.app, state)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._loop = loop = asyncio.get_running_loop()
        loop.set_default_executor(SlotExecutor(loop))
        await receive()
        start = asyncio.create_task(self._start(scope))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._enter("stopping")
        self.slots.close_queue()
        start.cancel()
        for task in (self._wearing, self._leaving):
            if task is not None:
                task.cancel()
        await self.slots.all_free()
        self._watchdog.stop()
        if self._app_lifespan is not None:
            await self._app_lifespan.shutdown()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self, scope: Scope) -> None:
        logger.info("loading %s, %d slots", self.settings.app, self.slots.total)
        try:
            self._app = await load_in_thread(self._load)
            lifespan = Lifespan(self._app, scope)
            await lifespan.startup()
        except Exception:
            logger.exception("%s cannot be loaded", self.settings.app)
            self._enter("failed")
            self._on_failure()
            return
        self._app_lifespan = lifespan
        self._watchdog.start()
        await self._prove(scope.get("state"))

    async def _prove(self, state: Mapping[str, Any] | None) -> None:
        """Let clients in, after the pause that an earlier trip asks for and a good answer to the smoke request."""
        trip, smoke = self._breaker.last_trip, self.settings.smoke
        if trip is not None:
            seconds = trip.seconds_left(time.time())
            logger.warning("taken out %d times in a row (%s): waiting %.1f s", trip.count, trip.reason, seconds)
            self._enter("suspect")
            await asyncio.sleep(seconds)
        if smoke is not None:
            # In a slot of its own, so that threads it may leave behind have ended before a client's work begins.
            finished = asyncio.Event()
            slot = Slot(finished.set)
            current_slot.set(slot)
            if fault := await smoke.ask(self._app, state):
                self._take_out(f"smoke request {smoke.method} {smoke.path}: {fault}")
                return
            slot.release()
            await finished.wait()
            self._succeed()
        self._enter("ready")
        self._wearing = asyncio.create_task(self._watch_wear())

    async def _watch_wear(self) -> None:
        """Recycle the instance once it has worn out: refuse what comes, finish what runs, and start anew."""
        loop = asyncio.get_running_loop()
        limits, began = self.settings.limits.for_instance(self.settings.instance), loop.time()
        if fault := limits.reached(Wear(megabytes=resident_megabytes())):
            self._misfit = f"{fault}, though nothing was done yet: it is not recycled for its memory"
            logger.error("%s %s", self.settings.app, self._misfit)
            limits = replace(limits, megabytes=None)
        while limits != UNLIMITED and self.state == "ready":
            await asyncio.sleep(recycling.CHECK_SECONDS)
            worked = self.requests["served"] + self.requests["failed"]
            reason = limits.reached(Wear(resident_megabytes(), worked, loop.time() - began))
            if reason and self.state == "ready" and loop.time() - began >= recycling.LEAST_SECONDS:
                logger.info("%s %s", self.settings.app, reason)
                self._worn_out = reason
                self._enter("recycling")
                self.slots.close_queue()
                self._leaving = asyncio.create_task(self._leave())

    def _succeed(self) -> None:
        if self._breaker.succeed():
            self._trip_file.clear()

    def _take_out(self, reason: str) -> None:
        """Refuse every request from now on, and end the process when its work is done."""
        trip = self._breaker.trip(reason[:REASON_CHARACTERS], time.time())
        logger.error("%s; %g s of pause for the next process", reason, trip.pause_seconds)
        self._enter("suspect")
        self.slots.close_queue()
        self._trip_file.save(trip)
        self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        """End the process when its work is done: but a thread that hangs in a driver never ends."""
        seconds = self.settings.time_limit_seconds
        try:
            await asyncio.wait_for(self.slots.all_free(), seconds)
        except asyncio.TimeoutError:
            held = f"{self.slots.in_flight} of {self.slots.total} slots still at work after {seconds:g} s"
            logger.error("%s hangs: %s, it ends without them", self.settings.app, held)
            faulthandler.dump_traceback(STDERR)  # of every thread
        await asyncio.sleep(FAREWELL_SECONDS)
        if self._app_lifespan is not None:
            await asyncio.wait([asyncio.ensure_future(self._app_lifespan.shutdown())], timeout=SHUTDOWN_SECONDS)
        self._on_failure()

    async def _administer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        question = scope["path"][len(PREFIX) + 1 :]
        if not may_ask(scope, self.settings.admin_from):
            question = ""
        status = self.status()
        if question == "slot" and header(scope, b"x-request-id"):
            await self._keep_slot(scope, receive, send)
        elif question == "send_away" and scope["method"] == "POST":
            await reply(receive, send, 200, json.dumps({"sent_away": self.slots.send_away()}).encode())
        elif question not in {"live", "ready", "status", "metrics"}:
            message = "There is nothing here / 请求的资源不存在"
            await reply(receive, send, 404, error_json("not_found", message, "not_found"))
        elif question == "metrics":
            await reply(receive, send, 200, metrics_text(status), "text/plain; version=0.0.4; charset=utf-8")
        elif question == "status":
            await reply(receive, send, 200, json.dumps(status, ensure_ascii=False).encode())
        else:
            brief = {name: status[name] for name in ("state", "since", "reason")}
            code = 200 if question == "live" or self.state == "ready" else 503
            await reply(receive, send, code, json.dumps(brief).encode())

    async def _keep_slot(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer when it is the turn of the request that the gateway asks for, and keep it a slot; else refuse it."""
        patience = self.settings.queue_timeout_seconds
        since = asyncio.get_running_loop().time() - min(seconds_waited(scope), patience)
        # Its status: neither 2xx, which lets the request in, nor 401, which the gateway keeps for itself.
        if self.state != "ready" or not (slot := await self.slots.wait(since, since + patience)):
            await self._refuse(scope, receive, send, status=403)
            return
        self._reserved.keep(header(scope, b"x-request-id"), slot)
        await reply(receive, send, 200, b"{}")

    async def _admit(self, scope: Scope) -> Slot | None:
        """Take a slot, or the one that is kept for this request.

        A client that has its whole answer may ask again before the app has returned from sending it.
        """
        if slot := self._reserved.claim(header(scope, b"x-request-id")):
            if self.state == "ready":
                return slot
            slot.release()
        for _ in range(FINISHING_TICKS):
            # Asked each time: an instance may be taken out while a request waits here.
            if self.state != "ready":
                return None
            if (slot := self.slots.take()) or not any(exchange.answered for exchange in self._running):
                return slot
            await asyncio.sleep(0)
        return None

    async def _serve(self, slot: Slot, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope["type"], receive, send, from_gateway(scope))
        work = asyncio.create_task(self._work(slot, scope, exchange))
        self._running[exchange] = work  # the loop itself keeps no strong reference
        await exchange.forward()
        await work

    async def _work(self, slot: Slot, scope: Scope, exchange: Exchange) -> None:
        """Run the app for one request, in a task that the server cannot cancel."""
        current_slot.set(slot)
        raised: Exception | None = None
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            raised = error
            if exchange.told:
                logger.info("%s ended %s with %r: its client had left", self.settings.app, scope["path"], error)
            elif exchange.gone or exchange.answered:
                # The server does not wait any more, or takes this for a client that left.
                logger.exception("%s failed at %s", self.settings.app, scope["path"])
            if not exchange.gone:
                raise
        finally:
            short = exchange.missing > 0 and scope.get("method") != "HEAD"
            unfinished = scope["type"] == "http" and (short or not exchange.answered)
            server_error = exchange.status is not None and exchange.status >= 500
            failed = server_error or ((raised is not None or unfinished) and not exchange.gone)
            self.requests["failed" if failed else "served"] += 1
            self._judge(scope, exchange, failed, raised)
            del self._running[exchange]
            slot.release()
            exchange.end()

    def _judge(self, scope: Scope, exchange: Exchange, failed: bool, raised: Exception | None) -> None:
        """Tell the breaker what a request shows: nothing, when its client left or had asked for something wrong."""
        if failed:
            if not exchange.cut and self._breaker.fail() and self.state == "ready":
                server_error = exchange.status is not None and exchange.status >= 500
                what = repr(raised) if raised else f"status {exchange.status}" if server_error else "half an answer"
                self._take_out(f"{self._breaker.failures} failed in a row, the last {scope['path']} with {what}")
        elif scope["type"] == "websocket" or (not exchange.cut and exchange.status and exchange.status < 400):
            self._succeed()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, status: int | None = None) -> None:
        self.requests["refused"] += 1
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1013})
            return
        reason = "full" if self.state == "ready" else self.state
        code, seconds, message = REFUSALS[reason]
        # To the gateway 429 says "nothing was started here, try another GPU"; to anyone else 503 says "not ready".
        status = status or (429 if reason in {"full", "suspect", "recycling"} or from_gateway(scope) else 503)
        headers = [(b"retry-after", str(seconds).encode()), (b"x-slot-guard", reason.encode())]
        await reply(receive, send, status, error_json(code, message, "not_admitted"), headers=headers)

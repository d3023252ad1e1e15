"""Bringing the guarded app up and down: its import, then its lifespan."""

from __future__ import annotations

import asyncio
import importlib
import logging
import operator
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from slot_guard.messages import App, Message, Scope

logger = logging.getLogger("slot_guard")


class LoadError(Exception):
    """The guarded app cannot serve; the cause, if there is one, is what it raised."""


def import_app(path: str) -> App:
    """Import `module:attribute` (the attribute may be dotted) and return it, if it is callable."""
    module, _, attribute = path.partition(":")
    app = operator.attrgetter(attribute)(importlib.import_module(module))
    if not callable(app):
        raise LoadError(f"{path} is a {type(app).__name__} and not an ASGI app")
    return app


async def load_in_thread(load: Callable[[], App]) -> App:
    """Call `load` in a thread of its own, since it may take minutes; LoadError when it raises anything.

    A daemon thread and not the default executor, whose threads a stopping process would wait for.
    """
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[App] = loop.create_future()

    def deliver(setter: Callable[[Any], None], value: App | LoadError) -> None:
        if not loaded.cancelled():
            setter(value)

    def run() -> None:
        outcome: tuple[Callable[[Any], None], App | LoadError]
        try:
            outcome = (loaded.set_result, load())
        except BaseException as error:  # a module may well call sys.exit()
            failure = LoadError("the app cannot be imported")
            failure.__cause__ = error
            outcome = (loaded.set_exception, failure)
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(deliver, *outcome)

    threading.Thread(target=run, name="slot_guard-load", daemon=True).start()
    return await loaded


class Lifespan:
    """The guarded app's own lifespan, for apps that have one."""

    def __init__(self, app: App, scope: Scope) -> None:
        """Prepare the lifespan of `app`; `scope` is the server's lifespan scope, whose state is passed on."""
        self._app = app
        self._scope = scope
        self._events: asyncio.Queue[Message] = asyncio.Queue()
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        """Start the app; LoadError when it says that it cannot. One that raises or returns has no lifespan."""
        self._task = asyncio.create_task(self._run())
        answer = await self._tell("lifespan.startup")
        if answer["type"] == "lifespan.startup.failed":
            raise LoadError(f"the app's start-up failed: {answer.get('message', '')}")

    async def shutdown(self) -> None:
        """Shut the app down if it started a lifespan."""
        if self._task is None:
            return
        if not self._task.done():
            answer = await self._tell("lifespan.shutdown")
            if answer["type"] == "lifespan.shutdown.failed":
                logger.error("the app's shutdown failed: %s", answer.get("message", ""))
        await self._task

    async def _tell(self, event: str) -> Message:
        self._events.put_nowait({"type": event})
        return await self._answers.get()

    async def _run(self) -> None:
        try:
            await self._app(dict(self._scope), self._events.get, self._answers.put)
        except Exception as error:
            logger.info("the app's lifespan ended with %r", error)
        self._answers.put_nowait({"type": "lifespan.ended"})

"""ASGI types, and whole answers in one call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DRAIN_SECONDS = 5.0
"""How long the body of an answered request is read on."""


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def started(message: Message) -> Message:
    """An answer of the app that the gateway cannot take for a refusal of the guard's.

    To the gateway 429 says that nothing was started; it would have the request run on every other GPU as well. So an
    app's own 429 becomes 503 there, with its headers and its body.
    """
    if message["status"] != 429:
        return message
    return {**message, "status": 503, "headers": [*message.get("headers", ()), (b"x-slot-guard", b"app-429")]}


def announced(start: Message) -> int:
    """Bytes that the head of an answer says will follow; 0 where it does not say, or where none may follow."""
    if start["status"] in {204, 304}:
        return 0
    lengths = [value for name, value in start.get("headers", ()) if name.lower() == b"content-length"]
    return int(lengths[0]) if lengths and lengths[0].isdigit() else 0


def unbuffered(start: Message) -> Message:
    """The `http.response.start` of a stream, which nginx then passes on piece by piece; any other as it is.

    A stream is an answer whose length is not said in its head. Without this header nginx holds the first pieces back
    until a buffer is full. An app that has set the header itself knows better.
    """
    headers = list(start.get("headers", ()))
    names = {name.lower() for name, _ in headers}
    if names & {b"content-length", b"x-accel-buffering"}:
        return start
    return {**start, "headers": [*headers, (b"x-accel-buffering", b"no")]}


def error_json(code: str, message: str, kind: str) -> bytes:
    """The error document that gateway, guard and services share."""
    error = {"code": code, "message": message, "type": kind, "timestamp": utc_now()}
    return json.dumps({"error": error}, ensure_ascii=False).encode()


async def reply(
    receive: Receive,
    send: Send,
    status: int,
    body: bytes,
    content_type: str = "application/json",
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Answer an HTTP request at once, then read what is left of its body.

    A server closes the connection of a request whose body was not read, and unread bytes turn that close into a reset
    that can overtake the answer: a gateway would then report a broken server instead of trying another one.
    """
    fixed = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_read_to_end(receive), DRAIN_SECONDS)


async def _read_to_end(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass

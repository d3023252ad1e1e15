"""One real request that a freshly loaded app must answer before any client's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import unquote

from slot_guard.messages import App, Message, Scope

REQUEST_ID = "smoke"
"""X-Request-ID of the smoke request: it tells a smoke from a client's request in what a service writes down."""


@dataclass(frozen=True)
class Smoke:
    """A request and the status that a working app answers it with."""

    path: str
    """Path as a client asks for it, with the query."""
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: str = ""
    status: int = 200
    time_limit_seconds: float = 300.0

    @classmethod
    def from_json(cls, text: str) -> Smoke:
        """Read {path, method?, headers?, body?, status?, time_limit_seconds?}; ValueError says what is wrong."""
        given = json.loads(text)
        if not isinstance(given, dict) or not str(given.get("path", "")).startswith("/"):
            raise ValueError("it must be a JSON object with a path that begins with /")
        known = {field.name for field in fields(cls)}
        if unknown := set(given) - known:
            raise ValueError(f"it has no field {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
        texts = [given.get(name, "") for name in ("path", "method", "body")]
        headers = given.pop("headers", {})
        if not isinstance(headers, dict) or not all(isinstance(text, str) for text in (*texts, *headers.values())):
            raise ValueError("path, method, body and the values of headers must be text")
        numbers = [given.get(name, 1) for name in ("status", "time_limit_seconds")]
        if not all(type(number) in {int, float} and number > 0 for number in numbers):
            raise ValueError("status and time_limit_seconds must be numbers above 0")
        return cls(headers=tuple(headers.items()), **given)

    def scope(self, state: Mapping[str, Any] | None) -> Scope:
        """The request as an ASGI scope; `state` is what the app's lifespan left for its requests."""
        path, _, query = self.path.partition("?")
        body_length = str(len(self.body.encode()))
        headers = {"host": "localhost", "x-request-id": REQUEST_ID, "content-length": body_length}
        headers.update((name.lower(), value) for name, value in self.headers)
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
        }
        return scope if state is None else {**scope, "state": dict(state)}

    async def ask(self, app: App, state: Mapping[str, Any] | None = None) -> str | None:
        """Send the request to `app`: None when its answer is good, else what is wrong with it."""
        requests: list[Message] = [{"type": "http.request", "body": self.body.encode()}]
        answer: list[Message] = []
        answered = asyncio.Event()

        async def receive() -> Message:
            if not requests:
                await answered.wait()
                return {"type": "http.disconnect"}
            return requests.pop()

        async def send(message: Message) -> None:
            answer.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                answered.set()

        call = asyncio.ensure_future(app(self.scope(state), receive, send))
        try:
            # Not wait_for(): that would wait on for work which cannot be cancelled.
            await asyncio.wait([call], timeout=self.time_limit_seconds)
        finally:
            call.cancel()
        status = answer[0].get("status") if answer else None
        if not call.done():
            return f"no answer within {self.time_limit_seconds:g} s"
        if call.cancelled():
            return "it cancelled itself"
        if error := call.exception():
            return repr(error)
        if status != self.status:
            return f"status {status} and not {self.status}"
        return None if answered.is_set() else "an unfinished answer"

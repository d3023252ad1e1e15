"""What is told of one pass, in every form that somebody asks for; each is made once, however many ask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from fleet_agent import status


class Reply(NamedTuple):
    """An answer: status code, media type and text."""

    status: int
    content_type: str
    text: str


class Edition:
    """The documents and the events of one pass."""

    def __init__(self, view: status.View, before: Mapping[str, Any] | None = None) -> None:
        """Tell `view`; `before` is the document that viewers were told last, if there are any."""
        self._view, self._before = view, before

    @cached_property
    def document(self) -> dict[str, Any]:
        """The status document."""
        return status.document(self._view)

    @cached_property
    def replies(self) -> dict[str, Reply]:
        """What is answered, by path."""
        code = 503 if self.document["status"] == "down" else 200
        metrics = status.metrics(self.document, self._view.seconds)
        return {
            "/cluster/status": Reply(code, "application/json", self._json + "\n"),
            "/health": Reply(code, "text/plain; charset=utf-8", status.health(self.document)),
            "/metrics": Reply(200, "text/plain; version=0.0.4; charset=utf-8", metrics),
        }

    @cached_property
    def whole(self) -> bytes:
        """The event for a viewer who knows nothing yet."""
        return _event("whole", self._json)

    @cached_property
    def change(self) -> bytes:
        """The event for a viewer who knows what was told before."""
        change = status.difference(self._before, self.document) if self._before else None
        return _event("change", _json(change)) if change else self.whole

    @cached_property
    def _json(self) -> str:
        return _json(self.document)


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False)


def _event(name: str, line: str) -> bytes:
    return f"event: {name}\ndata: {line}\n\n".encode()

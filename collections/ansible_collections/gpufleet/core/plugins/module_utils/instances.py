# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Instances as a host reaches them over TCP: what their guards say, and whether they answer a real request.

Standard library only, Python 3.9 or newer. No proxy of the environment is used.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

CONNECT_SECONDS = 1.0
#: Beyond the connection, until an event loop that its app holds is told from one that answers.
ANSWER_SECONDS = 2.0
#: X-Request-ID of a smoke request, the guard's own included: in what a service writes down it tells it from a client's.
SMOKE_REQUEST_ID = "smoke"
#: Of an answer that is shown to people.
SHOWN_BYTES = 2000


@dataclass(frozen=True)
class Answer:
    """What an instance says of itself, or why it says nothing; one that is busy still accepts connections."""

    status: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    connected: bool = True
    refused: bool = False


@dataclass(frozen=True)
class Instance:
    """An instance as the gateway reaches it; ``port`` 0 means that it cannot be asked."""

    id: str
    address: str = ""
    port: int = 0

    def ask(self, question: str) -> Answer:
        """Ask its guard ``status`` or ``ready``."""
        connection = http.client.HTTPConnection(self.address.strip("[]"), self.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError)
            return Answer(problem=f"{type(error).__name__}: {error}", connected=False, refused=refused)
        try:
            connection.sock.settimeout(ANSWER_SECONDS)
            connection.request("GET", f"/_slot_guard/{question}")
            response = connection.getresponse()
            status = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            return Answer(problem=f"{type(error).__name__}: {error}")
        finally:
            connection.close()
        if response.status != http.client.OK:
            return Answer(problem=f"HTTP {response.status} {status}")
        return Answer(status)

    def send_away(self) -> None:
        """Have its guard send away the requests that wait for a slot there. Whoever needs it asks again if it fails."""
        connection = http.client.HTTPConnection(self.address.strip("[]"), self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request("POST", "/_slot_guard/send_away")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()

    def try_out(self, request: Mapping[str, Any], timeout: float, may_be_full: bool = False) -> str:
        """Send it a smoke request (``path``, ``body``, ``content_type``); return what is wrong, or an empty text.

        :param may_be_full: whether its guard may refuse it because clients have every slot.
        """
        body, headers = str(request.get("body") or ""), {"X-Request-ID": SMOKE_REQUEST_ID}
        connection = http.client.HTTPConnection(self.address.strip("[]"), self.port, timeout=timeout)
        try:
            if body:
                headers["Content-Type"] = request.get("content_type") or "application/json"
                connection.request("POST", request["path"], body.encode(), headers)
            else:
                connection.request("GET", request["path"], headers=headers)
            response = connection.getresponse()
            answered = response.read()
        except (OSError, http.client.HTTPException) as error:
            return f"{request['path']}: {type(error).__name__}: {error}"
        finally:
            connection.close()
        is_full = response.getheader("X-Slot-Guard") == "full"
        if 200 <= response.status < 300 or (may_be_full and is_full):
            return ""
        return f"{request['path']}: HTTP {response.status} {answered[:SHOWN_BYTES].decode(errors='replace').strip()}"


def ask_all(instances: Iterable[Instance], question: str) -> dict[str, Answer]:
    """Ask all at a time; return the answers by id."""
    asked = list(instances)
    if not asked:
        return {}
    with ThreadPoolExecutor(min(len(asked), 64)) as pool:
        return dict(zip([one.id for one in asked], pool.map(lambda one: one.ask(question), asked)))

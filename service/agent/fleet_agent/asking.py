"""Asking all guards at a time how they are, within a deadline and bounded whatever they answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from fleet_agent.config import Instance
from fleet_agent.decision import DOWN, GUARD_STATES, SILENT, Answer

STATUS_PATH = "/_slot_guard/status"
MAX_ANSWER = 65_536
"""Bytes of a guard's head, and of its body. Its own hold some hundred, a stack of a blocked event loop included."""

COUNTS = ("waiting", "queue", "served", "refused", "failed", "started")
MAX_TEXT = 200
MAX_COUNT = 2**53
"""JSON's readers take numbers for doubles."""

LAG_LIMIT = 0.25
"""Seconds. An event loop that ran this late may have missed the answers that it waited for."""

_BEAT = 0.05
_AT_A_TIME = 50


class LoopLag:
    """How late the event loop ran at worst, in seconds: who was not given the CPU cannot call others slow."""

    def __init__(self) -> None:
        """Measure from now on; within a running loop."""
        self._loop = asyncio.get_running_loop()
        self._worst = 0.0
        self._schedule()

    def stop(self) -> float:
        """End and return the worst lag."""
        self._timer.cancel()
        return max(self._worst, self._loop.time() - self._due)

    def _schedule(self) -> None:
        self._due = self._loop.time() + _BEAT
        self._timer = self._loop.call_at(self._due, self._beat)

    def _beat(self) -> None:
        self._worst = max(self._worst, self._loop.time() - self._due)
        self._schedule()


async def ask_all(instances: Sequence[Instance], deadline: float) -> tuple[dict[str, Answer], float]:
    """Ask all instances at a time. Return what each answered within `deadline` seconds, and the loop's worst lag."""
    lag = LoopLag()
    ends = asyncio.get_running_loop().time() + deadline
    asked: dict[str, asyncio.Task[Answer]] = {}
    for number, instance in enumerate(instances):
        if number % _AT_A_TIME == 0:
            await asyncio.sleep(0)  # else the loop would run late because of so many beginnings
        asked[instance.id] = asyncio.create_task(ask(instance))
    await asyncio.wait(asked.values(), timeout=ends - asyncio.get_running_loop().time())
    late = [task for task in asked.values() if not task.done()]
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    silence = Answer(SILENT, f"no answer within {deadline:g} s")
    return {name: silence if task.cancelled() else task.result() for name, task in asked.items()}, lag.stop()


async def ask(instance: Instance) -> Answer:
    """Ask one guard for its status, on a connection of its own.

    A refused connection is definite: nothing listens there. What is not a guard's status is silence, since it does not
    say that the instance cannot serve.
    """
    host = instance.address.strip("[]")
    try:
        reader, writer = await asyncio.open_connection(host, instance.port, limit=MAX_ANSWER)
    except ConnectionRefusedError:
        return Answer(DOWN, "refuses connections")
    except (OSError, ValueError) as error:  # ValueError: no host name, as IDNA has it
        return Answer(SILENT, f"cannot be reached: {_one_line(error)}")
    try:
        # HTTP/1.0, so that the answer comes in one piece.
        writer.write(f"GET {STATUS_PATH} HTTP/1.0\r\nHost: {instance.address}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        return read_status(head, await _body(reader, head))
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError, RecursionError) as error:
        return Answer(SILENT, f"answers without a status: {_one_line(error)}")
    finally:
        writer.transport.abort()


def read_status(head: bytes, body: bytes) -> Answer:
    """A guard's answer to the question for its status; ValueError where it is none, RecursionError where it is evil."""
    words = head.split(b"\r\n", 1)[0].split(b" ")
    if words[1:2] != [b"200"]:
        raise ValueError(head[:MAX_TEXT].split(b"\r\n", 1)[0].decode(errors="replace"))
    status = json.loads(body)
    state = _text(status.get("state")) if isinstance(status, dict) else ""
    if state not in GUARD_STATES or not _is_count(status.get("in_flight")):
        raise ValueError("no state or no in_flight in it")
    numbers: dict[str, Any] = {"in_flight": status["in_flight"]}
    numbers.update({name: _text(status.get(name)) for name in ("version", "warning")})
    numbers.update({name: status[name] for name in COUNTS if _is_count(status.get(name))})
    return Answer(state, _text(status.get("reason")), _text(status.get("since")), numbers)


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The body, as long as Content-Length says, else to the end; ValueError when it is longer than MAX_ANSWER."""
    fields = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    length = next((int(value) for name, _, value in fields if name.lower() == b"content-length"), None)
    if length is not None and length <= MAX_ANSWER:
        return await reader.readexactly(length)
    if length is None:
        try:
            await reader.readexactly(MAX_ANSWER + 1)
        except asyncio.IncompleteReadError as end:
            return end.partial
    raise ValueError(f"more than {MAX_ANSWER} bytes")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def _text(value: object) -> str:
    """A text in one line, without the half characters that JSON lets through and no file or answer can hold."""
    return " ".join(value.split())[:MAX_TEXT].encode(errors="replace").decode() if isinstance(value, str) else ""


def _one_line(error: BaseException) -> str:
    return _text(str(error)) or type(error).__name__

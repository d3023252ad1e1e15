"""What operators and roll-outs did last: the end of the gateway's audit log, and no more of it than everybody may know.

Who did it and in which words, and what a host said of a failure, stay in the log: they name people and may quote a
secret. A record is told only as far as its fields are plain words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST = 20
"""So many changes are told."""

TAIL = 65_536
"""Bytes at the end of the log in which they are looked for."""

Change = dict[str, Any]

_PLAIN = re.compile(r"[\w.,;:() +\u3002\uff08\uff09\uff0c\uff1a\uff1b-]{1,120}")
"""No `@` of an account, no `/` of a path, no quotation; punctuation also as Chinese has it."""


class AuditLog:
    """A log that may grow, be replaced, or not be there yet."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._seen: tuple[int, ...] = ()
        self._changes: tuple[Change, ...] = ()

    def read(self, path: Path) -> tuple[Change, ...]:
        """The last changes of instances, the newest first; OSError where the log cannot be read."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return ()
        seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        if seen != self._seen:
            with path.open("rb") as file:
                file.seek(max(0, status.st_size - TAIL))
                self._changes = last_changes(file.read(TAIL).split(b"\n"))
            self._seen = seen
        return self._changes


def last_changes(lines: Iterable[bytes]) -> tuple[Change, ...]:
    """The last MOST changes of instances among the lines of a log, the newest first. What is no whole line is none."""
    changes = [change for change in map(_told, lines) if change]
    return tuple(reversed(changes[-MOST:]))


def _told(line: bytes) -> Change | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    change: Change = {name: plain(record.get(name)) for name in ("time", "what", "instance", "from", "to")}
    if not (change["time"] and change["what"] and change["instance"]):
        return None
    return {**change, "ok": record.get("result") == "ok"}


def plain(value: object) -> str | None:
    """The value, if it is plain words."""
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else None

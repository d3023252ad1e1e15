"""Drains: which instances get no request because somebody wants it so, and what everybody may know of that.

Which account it was stays in the flag: it names a person.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fleet_agent.audit import plain
from fleet_agent.flags import names

Drain = Mapping[str, Any]

UNKNOWN: Drain = {"by": None, "since": None, "reason": None}
"""All that is known of a flag without a record, such as somebody's `touch`."""


def read(directory: Path) -> dict[str, Drain]:
    """What the drain flags of a directory tell, by name; OSError where it cannot be read."""
    return {name: _told(directory / name) for name in names(directory)}


def _told(flag: Path) -> Drain:
    with suppress(OSError, ValueError):  # raised all the same
        record = json.loads(flag.read_bytes())
        if isinstance(record, dict) and record.get("owner") in ("operator", "rollout"):
            since = datetime.fromisoformat(str(record.get("since"))).isoformat()
            return {"by": record["owner"], "since": since, "reason": plain(record.get("reason"))}
    return UNKNOWN

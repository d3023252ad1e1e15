# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""What a gateway keeps besides nginx: drain flags, the lock of changing runs and the audit log.

All of it are small files below one directory that outlives a reboot, each replaced in one step. Standard library only,
Python 3.9 or newer.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Record = dict[str, Any]

AUDIT_LOG = "audit.log"
AUDIT_BYTES = 10_000_000
"""At this size, after some 40,000 changes, the audit log begins anew, and one old one is kept."""


def utc_now() -> str:
    """Return the time as records give it: ISO 8601, UTC, whole seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_record(path: Path) -> Record | None:
    """Return the record in a file, or None where there is no file. What is no record (somebody's `touch`) is empty."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def write_record(path: Path, record: Mapping[str, Any], replace: bool = True) -> bool:
    """Write a record in one step, safe from power loss, readable by all.

    :param replace: whether a file that is there may be replaced.
    :returns: whether it was written.
    """
    make_directory(path.parent)
    descriptor, candidate = tempfile.mkstemp(dir=path.parent.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            os.fchmod(stream.fileno(), 0o644)
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            Path(candidate).replace(path)
        else:
            os.link(candidate, path)
    except FileExistsError:
        return False
    finally:
        Path(candidate).unlink(missing_ok=True)
    _sync_directory(path.parent)
    return True


def remove_record(path: Path) -> bool:
    """Remove a record, safe from power loss. Return whether it was there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    _sync_directory(path.parent)
    return True


def append_audit(directory: Path, lines: list[Record]) -> None:
    """Append lines to the audit log of a gateway, one JSON object each, with the time as its first key."""
    if not lines:
        return
    make_directory(directory)
    log = directory / AUDIT_LOG
    if log.exists() and log.stat().st_size > AUDIT_BYTES:
        log.replace(f"{log}.1")
    text = "".join(json.dumps({"time": utc_now(), **line}, ensure_ascii=False) + "\n" for line in lines)
    # One write in append mode: lines of two runs cannot mix.
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.fstat(descriptor).st_size == 0:
            os.fchmod(descriptor, 0o644)  # whatever root's umask: the agent reads it, who is not root
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory that nginx and the agent may look into, as the gateway's tmpfiles.d entry does."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""The files of one system service as a whole: what is there, what is wanted, and the step between the two.

Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

Texts = Mapping[Path, Optional[str]]
"""Texts of files by path; None where there is none. A byte that is no UTF-8 is a surrogate, and written as it was."""


SECRET_MODE = 0o600


class Refused(Exception):
    """The wanted state could not be reached; the message is for the operator."""


class Commands:
    """Commands of the system, run on behalf of a module."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def command(self, *command: str, text: str | None = None) -> None:
        """Run a command, with ``text`` as its input; its error output is the reason of a refusal."""
        code, out, err = self.module.run_command(list(command), data=text)
        if code:
            raise Refused(f"{' '.join(command)} failed with {code}: {(err or out).strip()}")


def read(path: Path) -> str | None:
    """Return the text of a file, or None where there is none."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None


def write(path: Path, text: str | None, mode: int = 0o644) -> None:
    """Replace a file in one step, safe from power loss, or remove it where ``text`` is None.

    :param mode: its permissions; by default all may read it.
    """
    if text is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor, candidate = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(candidate).replace(path)
    except BaseException:
        Path(candidate).unlink()
        raise


def differences(found: Texts, wanted: Texts) -> list[dict[str, Any]]:
    """Return what differs as Ansible shows it: one diff per file, of what can be shown."""
    return [
        {
            "before": (found[path] or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
            "after": text or "",
            "before_header": str(path),
            "after_header": str(path),
        }
        for path, text in wanted.items()
        if found[path] != text
    ]

# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""What is wrong with an inventory, said the same way everywhere: where, which variable, its value, why, the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")

HIDDEN = "(hidden)"
"""Shown for what may be or hold a password."""


@dataclass
class Faults:
    """Everything that is wrong with an inventory, in the order found: one line each."""

    lines: list[str] = field(default_factory=list)
    places: set[str] = field(default_factory=set)

    def add(self, where: str, variable: str, value: object, problem: str, remedy: str) -> None:
        """Note that ``variable`` of ``where`` (a host or a service) has a value that cannot be used."""
        shown = "is not set" if value is None else f"= {value!r}"
        line = f"{where}: {variable} {shown}: {problem}. {remedy}{'' if remedy.endswith('?') else '.'}"
        self.lines.append(" ".join(line.split()))  # a name may hold the end of a line
        self.places.add(where)

    def unknown_key(self, where: str, path: str, key: object, value: object, known: Iterable[str]) -> None:
        """Note a key that nothing reads, with the one that was probably meant. Its value shows where it is a number.

        Anything else may be an `environment` under another name, or a password one level too high.
        """
        close = difflib.get_close_matches(str(key), list(known), n=1)
        remedy = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(known)}"
        shown = value if isinstance(value, (int, float)) else HIDDEN
        self.add(where, f"{path}{key}", shown, "nothing has this name", remedy)


def whole_number(value: Any, low: int, high: int, faults: Faults, where: str, variable: str, remedy: str) -> int | None:
    """``value`` as a whole number from ``low`` to ``high``, or None and a fault. ``-e`` and INI give digits as text."""
    if not isinstance(value, bool) and _WHOLE_NUMBER.fullmatch(str(value)) and low <= int(value) <= high:
        return int(value)
    faults.add(where, variable, value, f"not a whole number from {low} to {high}", remedy)
    return None

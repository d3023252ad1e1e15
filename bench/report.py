"""Results as a document: tables in Markdown, and what was hoped for beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.stats import Sample


@dataclass(frozen=True)
class Unit:
    """How a measure is shown: multiplied, with so many digits after the point, under a heading."""

    heading: str
    factor: float = 1.0
    digits: int = 0

    def show(self, rounds: Sequence[float]) -> str:
        """The median, and in brackets the lowest and the highest round where they differ from it."""
        sample = Sample(tuple(rounds))
        low, median, high = (
            f"{value * self.factor:,.{self.digits}f}" for value in (sample.low, sample.median, sample.high)
        )
        return median if low == high else f"{median} ({low} to {high})"


@dataclass(frozen=True)
class Goal:
    """Something hoped for: what was measured, and whether that is enough."""

    text: str
    measured: str
    met: bool


def origin(machine: Mapping[str, Any], target: str) -> str:
    """When, by which target of the Makefile, on what and with which versions it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Measured {machine['date']} by `make {target}` in one run of {machine['minutes']} minutes, on "
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"{versions}; load before {machine['load_before']}."
    )


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """A table in Markdown; all columns but the first are to the right, unless they are `words`."""
    lines = [heading, ["---", *["---" if words else "---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

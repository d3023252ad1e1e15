"""Command line of the fault matrix."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from testbed import PROJECT

from . import __doc__ as about_matrix
from . import loopback, report, rows
from .bed import standing
from .matrix import ROWS, Result, run

JSON = PROJECT / "docs" / "faults.json"
MARKDOWN = JSON.with_suffix(".md")
AT_A_TIME = 2
"""Contenders that run a row: most of it is waiting for what takes a known time."""


def main() -> int:
    """Run rows; the exit code tells whether all of gpufleet's were as they should be."""
    parser = argparse.ArgumentParser(prog="tests.fleet.faults", description=about_matrix)
    parser.add_argument(
        "part",
        nargs="?",
        choices=("docker", "rivals"),
        help="on a fleet in Docker, or beside rivals on loopback; without it both",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=ROWS,
        metavar="NAME",
        help="run these rows; of the others the table keeps what it has",
    )
    parser.add_argument("--list", action="store_true", help="name all rows; those with a * are run beside rivals too")
    options = parser.parse_args()
    if options.list:
        for name, row in ROWS.items():
            print(f"{name:<28}{'*' if row.beside else ' '} {row.text}")
        return 0
    # A process that is told to end unwinds: what it started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = options.only or list(ROWS)
    about = report.machine()
    results = matrix(names) if options.part != "rivals" else []
    seen = beside([name for name in names if ROWS[name].beside]) if options.part != "docker" else {}
    earlier = JSON.read_text() if JSON.exists() else ""
    table = report.merged(earlier, results, about, ROWS)
    contenders = [contender.name for contender in loopback.BESIDE]
    rivals = {name: report.merged(earlier, seen.get(name, []), about, ROWS, name) for name in contenders}
    JSON.write_text(report.document(table, about, rivals))
    MARKDOWN.write_text(report.markdown(table, about, rivals))
    bad = [result for result in [*results, *seen.get(loopback.GPUFLEET.name, [])] if result.faults]
    for result in bad:
        print(f"{result.name}: {'; '.join(result.faults)}", file=sys.stderr)
    return 1 if bad else 0


def matrix(names: Sequence[str]) -> list[Result]:
    """Run rows one after the other on one fleet."""
    results = []
    with standing() as fleet:
        for name in names:
            print(f"{name:<28}", end="", flush=True, file=sys.stderr)
            results.append(run(fleet, ROWS[name]))
            print(" ".join(report.cells(results[-1])[1:]), *results[-1].faults, file=sys.stderr, flush=True)
    return results


def beside(names: Sequence[str]) -> dict[str, list[Result]]:
    """Run rows one after the other, each with every contender."""
    seen: dict[str, list[Result]] = {contender.name: [] for contender in loopback.BESIDE}
    with loopback.beside() as stages, ThreadPoolExecutor(AT_A_TIME) as pool:
        for name in names:
            print(name, file=sys.stderr)
            results = pool.map(partial(run, chosen=ROWS[name]), stages)
            for contender, result in zip(seen, results, strict=True):
                seen[contender].append(result)
                print(f"    {contender:<16} {report.cell(result)} {result.trouble}", file=sys.stderr, flush=True)
    return seen


__all__ = ["main", "rows"]

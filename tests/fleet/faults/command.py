"""Command line of the fault matrix."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from testbed import PROJECT

from . import __doc__ as about_matrix
from . import report, rows
from .bed import standing
from .matrix import ROWS, Result, run

JSON = PROJECT / "docs" / "faults.json"
MARKDOWN = JSON.with_suffix(".md")


def main() -> int:
    """Run rows; the exit code tells whether all of them were as they should be."""
    parser = argparse.ArgumentParser(prog="tests.fleet.faults", description=about_matrix)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=ROWS,
        metavar="NAME",
        help="run these rows; of the others the table keeps what it has",
    )
    parser.add_argument("--list", action="store_true", help="name all rows")
    options = parser.parse_args()
    if options.list:
        for name, row in ROWS.items():
            print(f"{name:<28} {row.text}")
        return 0
    about = report.machine()
    results = matrix(options.only or list(ROWS))
    earlier = JSON.read_text() if JSON.exists() else ""
    table = report.merged(earlier, results, about, ROWS)
    JSON.write_text(report.document(table, about))
    MARKDOWN.write_text(report.markdown(table, about))
    bad = [result for result in results if result.faults]
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


__all__ = ["main", "rows"]

if __name__ == "__main__":
    sys.exit(main())

"""Measure all contenders in one run and write what came out: JSON, a Markdown document, a chart."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench import PROJECT
from bench.machine import describe
from bench.rollout import charts, report
from bench.rollout.fleet import FOLDER, fleets
from bench.rollout.scenarios import QUICK, Extent, measure

PACKAGES = ("ansible-core", "mitogen", "pyinfra")


def main(arguments: list[str]) -> int:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m bench rollout", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="try the harness on small fleets; it says little")
    parser.add_argument("--rounds", type=int, help="how often everything is measured")
    parser.add_argument("--minutes", type=float, help="when to begin no further scenario")
    parser.add_argument("--output", type=Path, help="folder for the results, docs/benchmarks unless --quick")
    options = parser.parse_args(arguments)
    output = options.output or PROJECT / (".cache/benchmarks" if options.quick else "docs/benchmarks")
    extent = QUICK if options.quick else Extent()
    extent = replace(extent, rounds=options.rounds or extent.rounds, minutes=options.minutes or extent.minutes)
    # A process that is told to end unwinds: the hosts that it started end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    machine, began = describe(), time.monotonic()
    machine["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    FOLDER.mkdir(parents=True, exist_ok=True)
    with fleets(extent.small, extent.large) as (small, large):
        results = measure(small, large, extent, tell)
    machine["minutes"] = round((time.monotonic() - began) / 60, 1)

    output.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "results": results}
    (output / "rollout.json").write_text(json.dumps(document, indent=1) + "\n")
    (output / "rollout.md").write_text(report.document(machine, results, charts.draw(machine, results, output)))
    print(f"written to {output}")
    return 0

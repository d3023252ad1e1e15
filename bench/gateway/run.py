"""Measure all contenders in one run and write what came out: JSON, a Markdown document, charts."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench import PROJECT
from bench.gateway import charts, report
from bench.gateway.fleet import Templates
from bench.gateway.scenarios import QUICK, SCENARIOS, Arena, Extent
from bench.gateway.software import Software
from bench.machine import describe


def main(arguments: list[str]) -> int:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m bench gateway", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="try the harness; what it measures says little")
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="print one scenario's figures as JSON")
    parser.add_argument("--output", type=Path, help="folder for the results, docs/benchmarks unless --quick")
    options = parser.parse_args(arguments)
    output = options.output or PROJECT / (".cache/benchmarks" if options.quick else "docs/benchmarks")
    # A process that is told to end unwinds: what it started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    machine, began, results = describe(), time.monotonic(), {}
    software = Software()
    machine["versions"] = software.versions()
    # A short path, because a socket's has 107 characters at most; one that nginx's workers, another user, can walk.
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder, Templates() as templates:
        Path(folder).chmod(0o755)
        with Arena(software, templates, Path(folder)) as arena:
            for name in options.only or SCENARIOS:
                print(f"{time.monotonic() - began:6.1f} s  {name}", file=sys.stderr, flush=True)
                results[name] = SCENARIOS[name](arena, QUICK if options.quick else Extent())
    machine["minutes"] = round((time.monotonic() - began) / 60, 1)
    if options.only:
        json.dump(results, sys.stdout, indent=1)
        return 0

    output.mkdir(parents=True, exist_ok=True)
    (output / "gateway.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    (output / "gateway.md").write_text(report.document(machine, results, charts.draw(machine, results, output)))
    for goal in report.goals(results):
        print(f"{'met   ' if goal.met else 'MISSED'} {goal.text}: {goal.measured}")
    print(f"written to {output}")
    return 0

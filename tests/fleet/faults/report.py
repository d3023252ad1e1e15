"""The table of a run, for people in Markdown and for programs in JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .matrix import Result
from .reckoning import Reckoning

HEADINGS = (
    "fault",
    "sent",
    "served",
    "refused",
    "app's own",
    "left",
    "in flight",
    "died with it",
    "lost",
    "twice",
    "wrong",
    "unusable",
    "recovery",
)

START = """\
# Faults

Written by `make faults`: {where}.

One gateway and three GPU hosts with two simulated cards each run as containers on that one machine. An inference takes
1 s and a model loads in 2 s, so that a recovery is nearly all gpufleet's own time, or the machine's. Every request is
reconciled with every inference.
"""

LEGEND = """\
- *sent*, *served*, *refused*: requests of clients, those answered with 200, and those told 503 "over the limit".
- *app's own*: got the faulty app's own answer. *left*: the client hung up on purpose.
- *in flight*: most inferences that ever ran at once on one card, counted there, and the slots that it has.
- *died with it*: in the hands of the process or host that was hit, told by 502, 504 or a cut connection; or sent while
  the gateway was down.
- *lost*: got no proper answer for any other reason. *twice*: ran on two cards. *wrong*: told "over the limit" although
  it ran, or answered although it did not.
- *unusable*: slots refused although the page called them free and ready, and for how long.
- *recovery*: from when the fault was taken away (or, where nobody does that, had struck) until all slots were ready and
  could be used at once."""


def machine() -> dict[str, Any]:
    """What a run is made on."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
    }


def merged(earlier: str, results: Iterable[Result], about: dict[str, Any], names: Iterable[str]) -> list[Result]:
    """Rows of these names in their order: those of now, and of an earlier JSON of the same machine the others."""
    known = json.loads(earlier) if earlier else {"machine": about, "rows": []}
    rows = known["rows"] if known["machine"] == about else []
    found = {row["name"]: _result(row) for row in rows} | {result.name: result for result in results}
    return [found[name] for name in names if name in found]


def _result(row: dict[str, Any]) -> Result:
    """A row of the JSON."""
    sums = {key: tuple(value) if isinstance(value, list) else value for key, value in row["sums"].items()}
    return Result(**{**{key: value for key, value in row.items() if key != "ok"}, "sums": Reckoning(**sums)})


def cells(result: Result) -> list[str]:
    """A line of the table."""
    sums = result.sums
    unusable = "0"
    if result.unusable:
        seconds = "to the end" if result.unusable_seconds is None else f"{result.unusable_seconds:.1f} s"
        unusable = f"{result.unusable}, {seconds}"
    recovery = "none" if result.recovery_seconds is None else f"{result.recovery_seconds:.1f} s"
    answers = (sums.sent, sums.served, sums.refused, sums.failed_by_app, sums.left)
    counts = (*answers, f"{result.peak} of {result.slots}", sums.died_with_it)
    bad = (len(sums.lost), len(sums.twice), len(sums.wrong))
    return [result.text, *map(str, (*counts, *bad)), unusable, recovery]


def markdown(results: Sequence[Result], about: dict[str, Any]) -> str:
    """The document."""
    lines = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *(cells(result) for result in results)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"- {result.text}: {result.note}\n" for result in results if result.note)
    dates = sorted({result.date for result in results})
    loads = sorted(result.load for result in results if result.load is not None)
    where = (
        f"{dates[0]} to {dates[-1]}, {about['cores']} cores of {about['cpu']}, Linux {about['kernel']},\n"
        f"whose load average before a row was {loads[0]} to {loads[-1]}, nearly all of it by others"
    )
    return f"{START.format(where=where)}\n{table}\n\n{LEGEND}\n" + (f"\n{notes}" if notes else "")


def document(results: Sequence[Result], about: dict[str, Any]) -> str:
    """The same and every request behind a sum that should be zero, as JSON."""
    rows = [{**asdict(result), "ok": not result.faults} for result in results]
    return json.dumps({"machine": about, "rows": rows}, indent=2, ensure_ascii=False) + "\n"

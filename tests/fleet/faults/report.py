"""The table of a run, for people in Markdown and for programs in JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.report import table

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

Written by `make faults`.

## In Docker

{where}.

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

BESIDE = """\
## Beside rivals

{where}.
`make faults-rivals` runs this part alone.

The article's own configuration (made loadable), a plain one-tier nginx and HAProxy are in
[bench/gateway/rivals](../bench/gateway/rivals). Each of them, and gpufleet, has a gateway and six simulated GPUs of two
slots on loopback, two contenders at a time; app, clients, faults and reckoning are those of above. gpufleet has its
guards, its agent and what renews its counts; the rivals have the app alone. Whatever ends is started again for all of
them, as Supervisor and systemd do. GPU hosts that are unreachable or lose their power are not here: loopback can
do neither honestly; nor is what only gpufleet has, an agent or a roll-out."""

BESIDE_LEGEND = """\
- **Bold** is what should not be: more *in flight* on one GPU than its two slots; *lost*, *twice* and *wrong* as above;
  slots that are gone *for good*: not back 40 s later, but only when the gateway was restarted.
- *slots away*: could not be used when all were tried at once, 1.5 s after the row, and until when after the fault.
  Where no guard is, Gunicorn takes requests while the model loads: they wait there, and no slot is away.
- HAProxy's queue lets twelve requests wait, for 5 s at most: of an overload it serves more, later.
- Whatever the article's configuration and the one-tier nginx get no answer to, they call an overload: *refused* where
  nothing ran, else *wrong*."""


def machine() -> dict[str, Any]:
    """What a run is made on."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
    }


def merged(
    earlier: str, results: Iterable[Result], about: dict[str, Any], names: Iterable[str], contender: str = ""
) -> list[Result]:
    """Rows of these names in their order: those of now, and of an earlier JSON of the same machine the others.

    They are those in Docker, or a contender's beside its rivals.
    """
    known = json.loads(earlier) if earlier else {}
    kept = known if known.get("machine") == about else {}
    rows = kept.get("beside", {}).get(contender, []) if contender else kept.get("rows", [])
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


def side_by_side(beside: Mapping[str, Sequence[Result]]) -> list[list[str]]:
    """The lines of the table beside rivals: a column for each contender."""
    texts = {result.name: result.text for results in beside.values() for result in results}
    seen = {name: {result.name: cell(result) for result in results} for name, results in beside.items()}
    return [[text, *(seen[contender].get(name, "") for contender in beside)] for name, text in texts.items()]


def cell(result: Result) -> str:
    """What came of a contender's requests, as far as there is anything to tell."""
    sums = result.sums
    counts = {"refused": sums.refused, "app's own": sums.failed_by_app, "died with it": sums.died_with_it}
    bad = {"lost": sums.lost, "twice": sums.twice, "wrong": sums.wrong}
    told = [f"{sums.served} served", *(f"{count} {what}" for what, count in counts.items() if count)]
    told += [f"**{result.peak} in flight**"] if result.peak > result.slots else []
    told += [f"**{len(names)} {what}**" for what, names in bad.items() if names]
    slots = "1 slot" if result.unusable == 1 else f"{result.unusable} slots"
    if result.trouble:
        told.append("**the row itself failed**")
    elif result.recovery_seconds is None:
        told.append(f"**{slots} gone for good**")
    elif result.unusable:
        told.append(f"{slots} away until {result.recovery_seconds:.1f} s after")
    return ", ".join(told)


def markdown(results: Sequence[Result], about: dict[str, Any], beside: Mapping[str, Sequence[Result]]) -> str:
    """The document."""
    parts = []
    if results:
        notes = "\n".join(f"- {result.text}: {result.note}" for result in results if result.note)
        start = START.format(where=where(results, about))
        parts += [start, table(HEADINGS, map(cells, results)), LEGEND, *filter(None, [notes])]
    if ran := [result for rows in beside.values() for result in rows]:
        lines = table(["fault", *beside], side_by_side(beside), words=True)
        parts += [BESIDE.format(where=where(ran, about)), lines, BESIDE_LEGEND]
    return "\n\n".join(parts) + "\n"


def where(results: Sequence[Result], about: dict[str, Any]) -> str:
    """When, and on what, rows were run."""
    dates = sorted(result.date for result in results)
    loads = sorted(result.load for result in results if result.load is not None)
    return (
        f"{dates[0]} to {dates[-1]}, {about['cores']} cores of {about['cpu']}, Linux {about['kernel']},\n"
        f"whose load average before a row was {loads[0]} to {loads[-1]}"
    )


def document(results: Sequence[Result], about: dict[str, Any], beside: Mapping[str, Sequence[Result]]) -> str:
    """The same and every request behind a sum that should be zero, as JSON."""
    shown = {contender: _rows(rows) for contender, rows in beside.items()}
    whole = {"machine": about, "rows": _rows(results), "beside": shown}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    return [{**asdict(result), "ok": not result.faults} for result in results]

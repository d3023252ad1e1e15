# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Action plugin gpufleet.core.rollout_progress: tell people how far a rollout is, and programs what was done.

One step on the controller after each batch, where set_fact, debug and set_stats would be three.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ansible.plugins.action import ActionBase

Entry = Mapping[str, Any]


def report(done: Sequence[Entry], total: int, elapsed: float, recent: int | None = None) -> list[str]:
    """Return the lines that tell people how far a rollout is.

    :param done: outcomes so far.
    :param total: instances that are to be rolled out.
    :param elapsed: seconds since it began.
    :param recent: tell only of so many last outcomes and how long the rest may take; else of all, as a table.
    """
    width = max((len(str(entry["instance"])) for entry in done), default=0)
    rows = []
    for entry in done[-recent:] if recent else done:
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in entry["seconds"].items())
        versions = f"{entry['from'] or 'none'} -> {entry['to'] or 'none'}"
        rows.append(
            f"{entry['instance']:<{width}}  {entry['change']}  {versions}  {entry['result']}  {phases}".rstrip()
        )
    summary = f"{len(done)} of {total} after {elapsed:.0f} s"
    if recent and len(done) < total:
        summary += f", about {elapsed / len(done) * (total - len(done)):.0f} s to go"
    failed = sum(entry["result"] != "ok" for entry in done)
    if failed:
        ways = "run the playbook again"
        if any(entry["change"] == "restart" for entry in done):
            ways = "restart it again: what was stopped stays drained until then, or until playbooks/undrain.yml"
        elif any(entry["from"] != entry["to"] for entry in done):
            ways += ", or go back with playbooks/rollback.yml"
        summary += f"; {failed} FAILED, the rest was left as it was. Correct the cause and {ways}"
    return [*rows, summary]


class ActionModule(ActionBase):
    """Adds the ``outcomes`` of a batch to those ``before``; ``total`` instances are rolled out since ``began``."""

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Tell it; all outcomes so far are the result's ``done``."""
        super().run(tmp, task_vars)
        before, outcomes, total = (self._task.args[name] for name in ("before", "outcomes", "total"))
        elapsed = round(time.time() - float(self._task.args["began"]), 1)
        done = [*before, *outcomes]
        is_ok = all(entry["result"] == "ok" for entry in done)
        is_over = not is_ok or len(done) == int(total)
        for line in report(done, int(total), elapsed, None if is_over else len(outcomes)):
            self._display.display(line)
        document = {"ok": is_ok, "elapsed_seconds": elapsed, "instances": done}
        stats = {"data": {"document": document}, "per_host": False, "aggregate": False}
        return {"changed": False, "done": done, "ansible_stats": stats}

# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Action plugin gpufleet.core.rollout_lock: say who asks, and whether a former holder is a process that has ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.core.plugins.plugin_utils.actor import actor

MODULE = "gpufleet.core.rollout_lock"


def boot_id() -> str:
    """Return what tells one boot of this machine from the next, random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_of(pid: int) -> str | None:
    """Return when a process of this machine was started (boot and clock ticks since it, proc(5)), None if it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot_id()}/{fields[19]}"


def this_run() -> dict[str, Any]:
    """Return the holder that this run is. The plugin runs in a worker: ansible-playbook is its parent."""
    pid = os.getppid()
    return {"by": actor(), "controller": socket.gethostname(), "pid": pid, "started": start_of(pid)}


def has_ended(holder: Mapping[str, Any], controller: str) -> bool:
    """Tell whether a holder was a process of this controller that is no more. Of other controllers nothing is known."""
    return holder.get("controller") == controller and start_of(int(holder.get("pid", 0))) != holder.get("started")


class ActionModule(ActionBase):
    """Asks for the lock, and a second time where the first answer names a run of this controller that has ended."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Take or free the lock; the result is the module's."""
        super().run(tmp, task_vars)
        arguments = {**self._task.args, "holder": this_run()}
        result = self._execute_module(MODULE, module_args=arguments, task_vars=task_vars)
        former = result.get("holder") or {}
        if (
            result.get("failed")
            and arguments["state"] == "held"
            and has_ended(former, arguments["holder"]["controller"])
        ):
            result = self._execute_module(MODULE, module_args={**arguments, "ended": former}, task_vars=task_vars)
        return result

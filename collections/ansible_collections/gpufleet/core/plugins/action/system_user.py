# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Action plugin gpufleet.core.system_user: look into the user database first, and call a module only for a change.

The module ansible.builtin.user takes a third of a second of processor time on every host to find nothing to do.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ansible.plugins.action import ActionBase


def is_as_wanted(entry: str, wanted: Mapping[str, str]) -> bool:
    """Tell whether a line of the user database, passwd(5), has the wanted name, comment, home and shell."""
    fields = entry.strip("\n").split(":")
    return [fields[0], *fields[4:]] == [wanted[field] for field in ("name", "comment", "home", "shell")]


class ActionModule(ActionBase):
    """Has a system user with ``name``, ``comment``, ``home`` and ``shell``."""

    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make or change the user where it differs; the result is then that of the module user."""
        super().run(tmp, task_vars)
        wanted = self._task.args
        entry = self._low_level_execute_command(shlex.join(["getent", "passwd", wanted["name"]]))["stdout"]
        if is_as_wanted(entry, wanted):
            return {"changed": False}
        arguments = {**wanted, "system": True}
        result: dict[str, Any] = self._execute_module(
            "ansible.builtin.user", module_args=arguments, task_vars=task_vars
        )
        return result

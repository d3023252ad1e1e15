# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Action plugin gpufleet.core.drain: say who drains, for the flag and the audit log."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.core.plugins.plugin_utils.actor import actor


class ActionModule(ActionBase):
    """Runs the module on behalf of whoever runs the playbook."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Drain, or let serve again; the result is the module's."""
        super().run(tmp, task_vars)
        arguments = {"by": actor(), **self._task.args}
        result: dict[str, Any] = self._execute_module(module_args=arguments, task_vars=task_vars)
        return result

# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Action plugin gpufleet.core.project_tool: run one of the project's own tools on the controller.

Without the module payload and the second Python that `command` on localhost takes: a tool that finds nothing to do is
done sooner than these are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.core.plugins.plugin_utils.project import PROJECT


class ActionModule(ActionBase):
    """Runs ``python -m NAME ARGUMENTS`` in the project, in check mode too; NAME and ARGUMENTS are the task's.

    The tool prints one JSON document. It is the result, with its ``changed``.
    """

    _supports_check_mode = True
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run it; AnsibleActionFail with what it said where it fails."""
        super().run(tmp, task_vars)
        command = [sys.executable, "-m", self._task.args["name"], *self._task.args["arguments"]]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        if done.returncode:
            raise AnsibleActionFail(done.stderr.strip() or f"{' '.join(command)} ended with status {done.returncode}.")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

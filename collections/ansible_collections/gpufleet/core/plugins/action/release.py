"""Action plugin gpufleet.core.release: ask the host first, copy the archive only when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.gpufleet.core.plugins.module_utils.archive import read_sidecar

MODULE = "gpufleet.core.release"


class ActionModule(ActionBase):
    """Runs the module once without the archive, and a second time with it if the host lacks the release."""

    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Deploy the release; the result is the module's."""
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        archive = Path(arguments.pop("archive")) if arguments.get("archive") else None
        arguments.pop("archive", None)
        sidecar = read_sidecar(archive) if archive else None
        if sidecar and self._task.diff:
            arguments["contents"] = sidecar["contents"]
        result = self._execute_module(MODULE, module_args=arguments, task_vars=task_vars)
        if not result.pop("needs_archive", False):
            return result
        if archive is None:
            damage = f"is damaged there ({', '.join(result['drift'])})" if result["drift"] else "is not on the host"
            raise AnsibleActionFail(f"Release {arguments['id']} {damage} and no archive was given to bring it.")
        if self._task.check_mode:
            return result
        if not sidecar or not sidecar["sha256"] or not archive.exists():
            raise AnsibleActionFail(f"{archive} and its sidecar are not on the controller: build them first.")
        arguments |= {"archive": self._send(archive), "sha256": sidecar["sha256"]}
        result = self._execute_module(MODULE, module_args=arguments, task_vars=task_vars)
        result.pop("needs_archive", None)
        return result

    def _send(self, archive: Path) -> str:
        """Copy the archive to the task's temporary folder on the host, which Ansible removes, and return its path."""
        if self._connection._shell.tmpdir is None:
            self._make_tmp_path()
        copy: str = self._connection._shell.join_path(self._connection._shell.tmpdir, archive.name)
        self._transfer_file(str(archive), copy)
        return copy

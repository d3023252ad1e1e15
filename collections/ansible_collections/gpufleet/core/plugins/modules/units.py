#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Ansible module: systemd units run with exactly these files, or nothing of ours is left of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.system_files import (
    Commands,
    Refused,
    Texts,
    differences,
    read,
    write,
)

DOCUMENTATION = r"""
module: units
short_description: Have systemd units run with the files that they read, or leave nothing of ours of them
description:
  - For each unit in turn, writes its files, lets them be checked, and enables and starts it, now and at every boot. A
    unit that runs is restarted or reloaded where a file changed, by a run that was cut off too. If it does not come up,
    the files are put back, and the unit as it was.
  - A unit that is not to run is stopped and disabled, and its files removed, where one of them is there; a unit of the
    same name without any of our files is somebody else's and left alone.
options:
  units:
    description: The units.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the unit, with its ending.
        type: str
        required: true
      run:
        description:
          - Whether it runs.
          - Left out, it is only given its files, where systemd knows it, and is restarted where it runs.
        type: bool
      files:
        description:
          - Texts by path of what it reads when it starts, its unit file or drop-in included.
          - An empty text means that there is no such file.
        type: dict
        default: {}
      watched:
        description: Likewise, but it sees by itself when they change.
        type: dict
        default: {}
      makes:
        description: Files that it makes by itself and that go with it.
        type: list
        elements: path
        default: []
      check:
        description: Command that judges the files once they are written. If it fails, they are put back.
        type: list
        elements: str
        default: []
      reload:
        description: Whether it takes changed files over by a reload. A changed unit file always means a restart.
        type: bool
        default: false
author: gpufleet contributors
"""

EXAMPLES = r"""
- name: Tell the metrics of this host
  gpufleet.core.units:
    units:
      - name: prometheus-node-exporter.service
        run: true
        files:
          /etc/systemd/system/prometheus-node-exporter.service.d/gpufleet.conf: "{{ drop_in }}"
"""

RETURN = r"""
touched:
  description: Names of the units that were, or in check mode would be, changed.
  type: list
  elements: str
  returned: always
"""

SYSTEMD = Path("/etc/systemd/system")
SETTLE_SECONDS = 1.0
"""How long a unit must have been active after its start: a wrong option ends a program at once."""

MARKS = Path("/run/gpufleet-units")
"""A file by the name of each unit that is being changed: one that is found tells of a run that was cut off."""

LOG_LINES = 15


class Unit(Commands):
    """One unit and its files."""

    def __init__(self, module: AnsibleModule, given: Mapping[str, Any]) -> None:
        super().__init__(module)
        self.name: str = given["name"]
        self.run: bool | None = given["run"]
        self.check: list[str] = given["check"]
        self.reload: bool = given["reload"]
        self.makes = [Path(path) for path in given["makes"]]
        self.mark = MARKS / self.name
        self.unfinished = self.mark.exists()
        self.disturbed = self.run is False
        state = self.state()
        self.known = state["LoadState"] == "loaded"
        self.active = state["ActiveState"] == "active"
        self.enabled = state["UnitFileState"] == "enabled"
        wanted = self.known if self.run is None else self.run
        self.read_at_start = {Path(path): text if wanted and text else None for path, text in given["files"].items()}
        watched = {Path(path): text if wanted and text else None for path, text in given["watched"].items()}
        self.wanted: Texts = {**self.read_at_start, **watched}
        self.found: Texts = {path: read(path) for path in self.wanted}

    def state(self) -> dict[str, str]:
        """What systemd knows of it."""
        names = "LoadState,ActiveState,UnitFileState"
        shown = self.module.run_command(["systemctl", "show", f"--property={names}", self.name])[1]
        pairs = (line.partition("=") for line in shown.splitlines())
        return {**dict.fromkeys(names.split(","), ""), **{name: value for name, _, value in pairs}}

    @property
    def differing(self) -> list[dict[str, Any]]:
        """What differs in its files, as Ansible shows it."""
        return differences(self.found, self.wanted)

    @property
    def as_wanted(self) -> bool:
        """Whether there is nothing to do."""
        return not self.unfinished and not self.differing and (not self.run or (self.active and self.enabled))

    def bring(self) -> None:
        """Bring files and unit to what is wanted, or back to what was found."""
        write(self.mark, "")
        try:
            if self.run is False and self.known:
                self.command("systemctl", "disable", "--now", "--quiet", self.name)
            self.write(self.wanted)
            self.command("systemctl", "daemon-reload")
            if self.check and self.run:
                self.command(*self.check)
            self.disturbed = True
            if self.run:
                self.command("systemctl", "enable", "--quiet", self.name)
            if self.run or (self.run is None and self.active):
                self.take_over()
        except Refused as refusal:
            raise Refused(f"{self.name}: {refusal}\n{self.put_back()}") from refusal
        if self.run is False:
            for path in self.makes:
                path.unlink(missing_ok=True)
        write(self.mark, None)

    def take_over(self) -> None:
        """Let the program read its files, where it has not seen them, and prove that it goes on."""
        changed = {path for path, text in self.read_at_start.items() if self.unfinished or self.found[path] != text}
        if self.active and not changed:
            return
        reloads = self.active and self.reload and not any(SYSTEMD in path.parents for path in changed)
        self.command("systemctl", "reload" if reloads else "restart", self.name)
        time.sleep(SETTLE_SECONDS)
        if self.state()["ActiveState"] != "active":
            log = self.module.run_command(["journalctl", "-u", self.name, "-n", str(LOG_LINES), "-o", "cat"])[1]
            raise Refused(f"it did not come up. The end of its log:\n{log}")

    def put_back(self) -> str:
        """Have the files that were found, and the unit as it was, and say how it is now.

        Where only files were touched, it went on.
        """
        undone = [verb for verb, was in (("stop", self.active), ("disable", self.enabled)) if not was]
        again = [verb for verb, was in (("enable", self.enabled), ("restart", self.active)) if was]
        for verb in undone if self.disturbed else []:
            self.module.run_command(["systemctl", verb, self.name])
        self.write(self.found)
        self.module.run_command(["systemctl", "daemon-reload"])
        for verb in again if self.disturbed else []:
            self.module.run_command(["systemctl", verb, self.name])
        if self.disturbed and self.active:
            time.sleep(SETTLE_SECONDS)
        state = self.state()
        if (state["ActiveState"] == "active", state["UnitFileState"] == "enabled") != (self.active, self.enabled):
            return f"Its files are as they were before, but it is {state['ActiveState']} and {state['UnitFileState']}."
        if self.disturbed or not self.unfinished:
            write(self.mark, None)
        return "It is as it was before."

    def write(self, texts: Texts) -> None:
        """Write the files that differ."""
        for path, text in texts.items():
            if read(path) != text:
                write(path, text)


def main() -> None:
    """Run the module."""
    unit_options = {
        "name": {"type": "str", "required": True},
        "run": {"type": "bool"},
        "files": {"type": "dict", "default": {}},
        "watched": {"type": "dict", "default": {}},
        "makes": {"type": "list", "elements": "path", "default": []},
        "check": {"type": "list", "elements": "str", "default": []},
        "reload": {"type": "bool", "default": False},
    }
    module = AnsibleModule(
        argument_spec={"units": {"type": "list", "elements": "dict", "required": True, "options": unit_options}},
        supports_check_mode=True,
    )
    units = [Unit(module, given) for given in module.params["units"]]
    touched = [unit for unit in units if not unit.as_wanted]
    result = {
        "changed": bool(touched),
        "touched": [unit.name for unit in touched],
        "diff": [difference for unit in touched for difference in unit.differing],
    }
    if not module.check_mode:
        try:
            for unit in touched:
                unit.bring()
        except Refused as refusal:
            module.fail_json(msg=str(refusal), **result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()

"""The fleet as Ansible derives it from an inventory, for what is not written in YAML: the demo and the test suites."""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import PROJECT
from testbed.shell import run

PLAYBOOK = Path(__file__).with_name("fleet.yml")


@dataclass(frozen=True)
class SshAccess:
    """How Ansible reaches a host over ssh; what the inventory leaves to ssh's own configuration is empty."""

    host: str
    address: str
    user: str
    key: str
    options: str


@dataclass(frozen=True)
class Description:
    """An inventory as the plays see it: `fleet` is their variable of that name, `access` is by host name."""

    fleet: dict[str, Any]
    access: dict[str, SshAccess]


def describe(inventory: Path) -> Description:
    """Ask Ansible for the fleet of an inventory; raise CommandFailed, with the faults, where it is refused."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "fleet.json")
        command = ("-m", "ansible", "playbook", "--inventory", str(inventory), str(PLAYBOOK))
        settings = f"ANSIBLE_CONFIG={PROJECT / 'ansible.cfg'}"
        run("env", settings, sys.executable, *command, "--extra-vars", json.dumps({"testbed_file": str(file)}))
        description = json.loads(file.read_text())
    columns = description["ssh"]
    rows = (SshAccess(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True))
    return Description(description["fleet"], {row.host: row for row in rows})

"""Running the same rollout again, or a part of it, finds nothing to do."""

import os
import re
import sys

import pytest

from testbed import PROJECT
from testbed.shell import run

TASKS_AT_MOST = {"gpu_servers": 15, "gateways": 20}


@pytest.mark.parametrize(
    "arguments",
    [["--check", "--diff"], ["--limit", "gateways"], ["--tags", "gateway"], ["--tags", "gpu_workers"]],
    ids=" ".join,
)
def test_a_second_rollout_changes_nothing(pytestconfig: pytest.Config, arguments: list[str]) -> None:
    command = (sys.executable, "-m", "ansible", "playbook", "-i", pytestconfig.getoption("ansible_inventory"))
    settings = f"ANSIBLE_CONFIG={PROJECT / 'ansible.cfg'}"
    output = run("env", "--unset=ANSIBLE_FORCE_COLOR", settings, *command, os.fspath(PROJECT / "site.yml"), *arguments)
    recap = re.findall(r"^(\S+) +: ok=(\d+) +changed=(\d+)", output, flags=re.MULTILINE)
    assert recap
    for host, tasks, changed in recap:
        assert changed == "0", (host, output)
        group = "gpu_servers" if host.startswith("gpu") else "gateways"
        assert int(tasks) <= TASKS_AT_MOST[group], host

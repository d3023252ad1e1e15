"""Running the same rollout again, or a part of it, finds nothing to do."""

import re

import pytest

from ..operations import Operator

TASKS_AT_MOST = {"gpu_servers": 15, "gateways": 20}


@pytest.mark.parametrize(
    "arguments",
    [["--check", "--diff"], ["--limit", "gateways", "--tags", "gateway"], ["--tags", "gpu_workers"]],
    ids=" ".join,
)
def test_a_second_rollout_changes_nothing(operator: Operator, arguments: list[str]) -> None:
    output = operator.play("site", *arguments)
    recap = re.findall(r"^(\S+) +: ok=(\d+) +changed=(\d+)", output, flags=re.MULTILINE)
    assert recap
    for host, tasks, changed in recap:
        assert changed == "0", f"{host}\n{output}"
        group = "gpu_servers" if host.startswith("gpu") else "gateways"
        assert int(tasks) <= TASKS_AT_MOST[group], host

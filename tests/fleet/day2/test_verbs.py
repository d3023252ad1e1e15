"""Verbs for people and programs, one run at a time, and what is written down."""

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from testbed.shell import CommandFailed

from ..operations import Operator, Page, wait_until, words


def test_the_page_tells_the_fleet(page: Page, fleet: dict[str, Any]) -> None:
    document = page.read()
    assert document["status"] == "healthy"
    assert document["total_capacity"] == document["available_capacity"] == fleet["capacity"]
    assert page.states() == {instance["id"]: "ready" for instance in fleet["instances"]}


@pytest.mark.parametrize("verb", ["status", "smoke", "doctor"])
def test_a_verb_gives_programs_one_document(operator: Operator, fleet: dict[str, Any], verb: str) -> None:
    document = operator.document(verb)
    assert document["ok"] and document["exit_code"] == 0
    assert [instance["id"] for instance in document["instances"]] == [one["id"] for one in fleet["instances"]]


def test_the_doctor_finds_a_stopped_program(
    operator: Operator, page: Page, fleet: dict[str, Any], on: Callable[[str], Host]
) -> None:
    instance = fleet["instances"][0]
    on(instance["host"]).check_output("supervisorctl stop %s", instance["program"])
    page.wait_for("down", instance["id"])
    document = operator.document("doctor")
    assert document["exit_code"] != 0 and not document["ok"]
    (fault,) = document["faults"]
    assert fault.startswith(f"{instance['id']}: program {instance['program']} on {instance['host']} is STOPPED")
    on(instance["host"]).check_output("supervisorctl start %s", instance["program"])
    page.wait_for("ready", instance["id"], seconds=20)


def test_a_second_run_is_told_who_changes_the_fleet(
    operator: Operator, fleet: dict[str, Any], on: Callable[[str], Host]
) -> None:
    lock = on(fleet["gateways"][0]["host"]).file("/var/lib/gpufleet-gateway/lock.json")
    first = subprocess.Popen(operator.command("site", "--tags", "gateway"), stdout=subprocess.DEVNULL)
    try:
        # A run that failed before may have left its lock, which the first one takes over.
        wait_until(lambda: lock.exists and json.loads(lock.content_string)["pid"] == first.pid, 60)
        with pytest.raises(CommandFailed) as refused:
            operator.play("rollout")
        assert re.search(r"is changing the fleet since \S+: site.yml, .* break_lock=true", words(str(refused.value)))
    finally:
        assert first.wait(300) == 0
    assert not lock.exists

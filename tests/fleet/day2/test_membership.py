"""Hosts, cards and slots that come and go, with clients asking all the while."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from testbed.engine import Engine
from testbed.shell import CommandFailed

from ..load import SteadyLoad, post_at_once
from ..operations import Inventory, Operator, Page, wait_until, words


def test_a_host_and_a_card_leave_and_come_back(
    operator: Operator,
    inventory: Inventory,
    page: Page,
    load: SteadyLoad,
    pids: Callable[..., dict[str, str]],
    ledger: Callable[[], list[Any]],
    on: Callable[[str], Host],
) -> None:
    before = pids()
    gone = {name for name in before if "-gpu03-" in name}
    card = "cosyvoice2-gpu02-0"

    with pytest.raises(CommandFailed, match="There is no target"):
        operator.play("remove_host")
    assert "gpu03 serves nothing" in words(operator.play("remove_host", target="gpu03"))
    with inventory.edited("hosts.yml") as groups:
        gpu03 = groups["gpu_servers"]["hosts"].pop("gpu03")
        groups["gpu_servers"]["hosts"]["gpu02"].update(gpus=[1], gpu_count=None)
    operator.play("site")
    kept = {name: pid for name, pid in before.items() if name not in {card, *gone}}
    assert page.states() == dict.fromkeys(kept, "ready")
    assert page.read()["total_capacity"] == 6
    assert pids() == kept
    assert not on("gpu02").socket("tcp://0.0.0.0:12321").is_listening

    with inventory.edited("hosts.yml") as groups:
        groups["gpu_servers"]["hosts"]["gpu03"] = gpu03
    operator.play("site", "--limit", "gpu03,gateways")
    assert page.states() == dict.fromkeys({*kept, *gone}, "ready")
    assert page.read()["total_capacity"] == 10

    inventory.restore()
    operator.play("site")
    assert page.states() == dict.fromkeys(before, "ready")
    assert page.read()["total_capacity"] == 12
    assert {name: pid for name, pid in pids().items() if name in kept} == kept
    wait_until(lambda: {event.instance for event in ledger()[-60:]} == set(before), 30)


def test_fewer_slots_on_one_card_touch_no_other(
    operator: Operator,
    inventory: Inventory,
    page: Page,
    pids: Callable[..., dict[str, str]],
    url: Callable[..., str],
    client_addresses: list[str],
) -> None:
    before = pids()
    with inventory.edited("hosts.yml") as groups:
        groups["gpu_servers"]["hosts"]["gpu01"].update(gpus=[{"device": 0, "slots": 1}, 1], gpu_count=None)
    for capacity in (11, 12):
        operator.play("site")
        after = pids()
        assert [name for name in before if before[name] != after[name]] == ["cosyvoice2-gpu01-0"]
        assert page.read()["total_capacity"] == capacity
        answers = post_at_once(url("audio-generate"), client_addresses, {"text": "数"})
        assert Counter(answer.status for answer in answers) == {200: capacity, 503: 20 - capacity}
        before = after
        inventory.restore()


def test_a_dead_host_is_kept_out_and_can_be_removed(
    operator: Operator,
    page: Page,
    fleet: dict[str, Any],
    engine: Engine,
    container: Callable[[str], str],
    url: Callable[..., str],
    client_addresses: list[str],
) -> None:
    dead = [instance["id"] for instance in fleet["instances"] if instance["host"] == "gpu03"]
    engine.docker("kill", container("gpu03"))
    try:
        page.wait_for("down", *dead, seconds=10)
        answers = post_at_once(url("audio-generate"), client_addresses[:8], {"text": "还在"})
        assert Counter(answer.status for answer in answers) == {200: 8}
        with pytest.raises(CommandFailed, match=r"\[gpu03\]: UNREACHABLE") as refused:
            operator.play("site")
        assert not re.search(r"changed=[1-9]", str(refused.value))
        assert "It could not be reached" in words(operator.play("remove_host", target="gpu03"))
    finally:
        engine.docker("start", container("gpu03"))
    page.wait_for("drained", *dead, seconds=60)
    operator.play("undrain", target="gpu03")
    page.wait_for("ready")

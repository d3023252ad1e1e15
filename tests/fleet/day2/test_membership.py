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


def test_a_host_a_card_and_a_slot_leave_and_come_back(
    operator: Operator,
    inventory: Inventory,
    page: Page,
    load: SteadyLoad,
    pids: Callable[..., dict[str, str]],
    ledger: Callable[[], list[Any]],
    audit: Callable[[], list[dict[str, Any]]],
    on: Callable[[str], Host],
) -> None:
    before = pids()
    host = {name for name in before if "-gpu02-" in name}
    card, smaller = "cosyvoice2-gpu01-3", "cosyvoice2-gpu01-0"
    untouched = {name: pid for name, pid in before.items() if name not in {card, smaller, *host}}

    def seen() -> tuple[dict[str, str], int]:
        """States by instance, and how many requests are served at once; what no edit concerned runs on."""
        assert {name: pid for name, pid in pids().items() if name in untouched} == untouched
        return page.states(), page.read()["total_capacity"]

    with pytest.raises(CommandFailed, match="There is no target"):
        operator.play("remove_host")
    assert "gpu02 serves nothing" in words(operator.play("remove_host", target="gpu02"))
    with inventory.edited("hosts.yml") as groups:
        hosts = groups["gpu_servers"]["hosts"]
        gpu02 = hosts.pop("gpu02")
        hosts["gpu01"].update(gpus=[{"device": 0, "slots": 1}, 1, 2], gpu_count=None)
    with inventory.service() as service:
        service["client_limit"] = 5
    operator.play("site")
    assert seen() == (dict.fromkeys({*untouched, smaller}, "ready"), 5)
    assert page.column("slots")[smaller] == 1 and pids()[smaller] != before[smaller]
    assert not on("gpu01").socket("tcp://0.0.0.0:12324").is_listening

    with inventory.edited("hosts.yml") as groups:
        groups["gpu_servers"]["hosts"]["gpu02"] = gpu02
    operator.play("site", "--limit", "gpu02,gateways")
    assert seen() == (dict.fromkeys({*untouched, smaller, *host}, "ready"), 9)

    inventory.restore()
    operator.play("site")
    assert seen() == (dict.fromkeys(before, "ready"), 12)
    assert {line["instance"] for line in audit() if line["what"] == "add"} == {card, *host}
    first, second, third = (line for line in audit() if line["what"] == "configure")
    assert (first["to"], second["to"]) == (second["from"], third["from"])
    wait_until(lambda: {event.instance for event in ledger()[-60:]} == set(before), 30)


def test_a_dead_host_is_kept_out_and_can_be_removed(
    operator: Operator,
    page: Page,
    fleet: dict[str, Any],
    engine: Engine,
    container: Callable[[str], str],
    url: Callable[..., str],
    client_addresses: list[str],
) -> None:
    dead = [instance["id"] for instance in fleet["instances"] if instance["host"] == "gpu02"]
    engine.docker("kill", container("gpu02"))
    try:
        page.wait_for("down", *dead, seconds=10)
        answers = post_at_once(url("audio-generate"), client_addresses[:8], {"text": "还在"})
        assert Counter(answer.status for answer in answers) == {200: 8}
        with pytest.raises(CommandFailed, match=r"\[gpu02\]: UNREACHABLE") as refused:
            operator.play("site")
        assert not re.search(r"changed=[1-9]", str(refused.value))
        assert "It could not be reached" in words(operator.play("remove_host", target="gpu02"))
    finally:
        engine.docker("start", container("gpu02"))
    page.wait_for("drained", *dead, seconds=60)
    operator.play("undrain", target="gpu02")
    page.wait_for("ready")

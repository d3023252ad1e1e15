"""Faults that nobody asked for: the fleet serves on and mends itself, without Ansible."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
from testinfra.host import Host

from testbed.engine import Engine

from ..load import SteadyLoad, post_at_once
from ..operations import Operator, Page, wait_until


def test_a_stopped_program_is_out_within_two_seconds_and_back_by_itself(
    page: Page, fleet: dict[str, Any], on: Callable[[str], Host], load: SteadyLoad
) -> None:
    instance = fleet["instances"][-1]
    on(instance["host"]).check_output("supervisorctl stop %s", instance["program"])
    page.wait_for("down", instance["id"], seconds=2)
    on(instance["host"]).check_output("supervisorctl start %s", instance["program"])
    page.wait_for("ready", instance["id"], seconds=20)


def test_a_card_that_fails_every_request_is_out_within_two_seconds(
    page: Page,
    fleet: dict[str, Any],
    service: dict[str, Any],
    url: Callable[..., str],
    client_addresses: list[str],
    on: Callable[[str], Host],
) -> None:
    """It has the fewest connections and so draws the load: without a breaker most requests would be lost there."""
    instance = fleet["instances"][-1]
    fault = f"{service['environment']['TTS_SIMULATED_FAULTS']}/{instance['device']}"
    with SteadyLoad(url("audio-generate"), client_addresses[:8], {"text": "坏"}, pause=0) as load:
        time.sleep(2)
        on(instance["host"]).check_output("mkdir -p %s && touch %s", fault.rpartition("/")[0], fault)
        time.sleep(4)
        assert page.states()[instance["id"]] in ("suspect", "down", "loading")
        assert page.column("reason")[instance["id"]]
        on(instance["host"]).check_output("rm %s", fault)
    failed = [answer.ended for answer in load.answers if answer.status != 200]
    assert {answer.status for answer in load.answers} == {200, 500}
    assert len(failed) <= service["failure_limit"] + instance["slots"]
    page.wait_for("ready", instance["id"], seconds=40)


def test_the_fleet_serves_without_its_agent(
    page: Page,
    fleet: dict[str, Any],
    on: Callable[[str], Host],
    load: SteadyLoad,
) -> None:
    gateway = on(fleet["gateways"][0]["host"])
    pid = gateway.check_output("supervisorctl pid fleet-agent")
    gateway.check_output("kill -STOP %s", pid)
    try:
        answer = httpx.get(f"{page.url}/cluster/status", trust_env=False, timeout=10)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "agent_not_answering"
        # Nobody raises a flag now: the gateway itself passes on what finds no connection.
        instance = fleet["instances"][-1]
        on(instance["host"]).check_output("supervisorctl stop %s", instance["program"])
        time.sleep(3)
        on(instance["host"]).check_output("supervisorctl start %s", instance["program"])
        time.sleep(8)
    finally:
        gateway.check_output("kill -KILL %s", pid)
    page.wait_for("ready", seconds=15)


def test_a_gpu_host_comes_back_from_a_power_failure(
    page: Page, fleet: dict[str, Any], engine: Engine, container: Callable[[str], str]
) -> None:
    lost = [instance["id"] for instance in fleet["instances"] if instance["host"] == "gpu02"]
    engine.docker("restart", "--time", "0", container("gpu02"))
    page.wait_for("down", *lost, seconds=10)
    page.wait_for("ready", seconds=60)


def test_the_gateway_comes_back_from_a_power_failure_with_its_drains(
    operator: Operator,
    page: Page,
    fleet: dict[str, Any],
    engine: Engine,
    container: Callable[[str], str],
    url: Callable[..., str],
    client_addresses: list[str],
) -> None:
    drained = fleet["instances"][0]
    operator.play("drain", target=drained["id"])
    engine.docker("restart", "--time", "0", container(fleet["gateways"][0]["host"]))
    wait_until(page.answers, 60)
    page.wait_for("drained", drained["id"], seconds=20)
    page.wait_for("ready", *(one["id"] for one in fleet["instances"] if one != drained), seconds=20)
    served = post_at_once(url("audio-generate"), client_addresses, {"text": "断电"})
    assert Counter(answer.status for answer in served) == {200: fleet["capacity"] - drained["slots"], 503: 10}
    operator.play("undrain", target=drained["id"])
    page.wait_for("ready")

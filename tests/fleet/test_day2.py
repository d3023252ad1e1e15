"""Edits and faults of every day, with clients asking all the while: nothing is lost, nothing runs twice."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml
from testinfra.host import Host

from testbed import PROJECT
from testbed.shell import CommandFailed, run

from .ledger import peaks, runs
from .load import SteadyLoad, post_at_once

SMOKE = "smoke"  # the request id of the guards' own trial requests, which no client sent


@pytest.fixture(scope="module")
def play(pytestconfig: pytest.Config) -> Callable[..., str]:
    """`play("drain", target="gpu02")` runs playbooks/drain.yml with extra variables; `play("site")` runs site.yml."""

    def call(name: str, **variables: Any) -> str:
        inventory = pytestconfig.getoption("ansible_inventory")
        playbook = PROJECT / (f"{name}.yml" if name == "site" else f"playbooks/{name}.yml")
        settings = f"ANSIBLE_CONFIG={PROJECT / 'ansible.cfg'}"
        command = (sys.executable, "-m", "ansible", "playbook", "-i", inventory, "-e", json.dumps(variables))
        return run("env", "--unset=ANSIBLE_FORCE_COLOR", settings, *command, os.fspath(playbook), seconds=600)

    return call


@pytest.fixture(scope="module")
def status(fleet: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """The gateway's status document, as it is now."""
    gateway = fleet["gateways"][0]["address"]
    return lambda: httpx.get(f"http://{gateway}:{fleet['port']}/cluster/status", trust_env=False).json()


def states(document: dict[str, Any]) -> dict[str, str]:
    return {instance["id"]: instance["state"] for instance in document["instances"]}


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Return once the condition holds; fail after `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not come about"
        time.sleep(0.1)


@pytest.fixture
def load(
    url: Callable[..., str],
    fleet: dict[str, Any],
    service: dict[str, Any],
    client_addresses: list[str],
    ledger: Callable[[], list[Any]],
) -> Iterator[SteadyLoad]:
    """Clients for half of the slots; afterwards every answer is reconciled with what ran on the cards."""
    clients = client_addresses[: service["capacity"] // 2]
    with SteadyLoad(url("audio-generate", service=service["name"]), clients, {"text": "一天"}) as running:
        yield running
    assert Counter(answer.status for answer in running.answers) == {200: len(running.answers)}
    ran = Counter({request: count for request, count in runs(ledger()).items() if request != SMOKE})
    assert ran == Counter(answer.request for answer in running.answers)
    slots = {instance["id"]: instance["slots"] for instance in fleet["instances"]}
    assert all(peak <= slots[instance] for instance, peak in peaks(ledger()).items())


def test_the_status_page_tells_the_fleet(status: Callable[[], dict[str, Any]], fleet: dict[str, Any]) -> None:
    document = status()
    assert document["status"] == "healthy"
    assert document["total_capacity"] == document["available_capacity"] == fleet["capacity"]
    assert states(document) == {instance["id"]: "ready" for instance in fleet["instances"]}


@pytest.mark.parametrize("verb", ["status", "smoke", "doctor"])
def test_the_verbs_find_nothing_wrong(play: Callable[..., str], verb: str) -> None:
    play(verb)


def test_a_drained_card_gets_no_request_until_undrained(
    play: Callable[..., str],
    status: Callable[[], dict[str, Any]],
    fleet: dict[str, Any],
    service: dict[str, Any],
    load: SteadyLoad,
    ledger: Callable[[], list[Any]],
) -> None:
    instance = next(one for one in fleet["instances"] if one["service"] == service["name"])
    target = f"{instance['host']}:{instance['gpu']}"
    play("drain", target=target)
    wait_until(lambda: states(status())[instance["id"]] == "drained", 5)
    before = len([event for event in ledger() if event.instance == instance["id"]])
    time.sleep(4)
    assert len([event for event in ledger() if event.instance == instance["id"]]) == before
    play("undrain", target=target)
    wait_until(lambda: states(status())[instance["id"]] == "ready", 5)


def test_a_stopped_program_is_out_within_two_seconds_and_back_by_itself(
    status: Callable[[], dict[str, Any]],
    fleet: dict[str, Any],
    service: dict[str, Any],
    on: Callable[[str], Host],
    load: SteadyLoad,
) -> None:
    instance = next(one for one in fleet["instances"] if one["service"] == service["name"])
    host = on(instance["host"])
    assert host.run("supervisorctl stop %s", instance["program"]).rc == 0
    wait_until(lambda: states(status())[instance["id"]] in ("down", "stopping"), 2)
    assert host.run("supervisorctl start %s", instance["program"]).rc == 0
    wait_until(lambda: states(status())[instance["id"]] == "ready", 20)


def changed_services(pytestconfig: pytest.Config, name: str, **fields: Any) -> dict[str, Any]:
    """The scenario's services with other fields for one of them."""
    folder = PROJECT / pytestconfig.getoption("ansible_inventory") / "group_vars/all"
    (file,) = [path for path in folder.glob("*.yml") if path.name != "all.yml"]
    services: dict[str, Any] = yaml.safe_load(file.read_text())["services"]
    services[name] = {**services[name], **fields}
    return services


def programs(on: Callable[[str], Host], fleet: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Process ids by host and program, once all are RUNNING: Supervisor names no pid before."""

    def lines() -> dict[tuple[str, str], str]:
        listed = ((host, on(host).run("supervisorctl status").stdout.splitlines()) for host in fleet["hosts"])
        return {(host, line.split()[0]): line for host, found in listed for line in found}

    wait_until(lambda: all("RUNNING" in line for line in lines().values()), 30)
    return {key: line.partition("pid ")[2].partition(",")[0] for key, line in lines().items()}


def test_a_changed_setting_is_rolled_out_card_by_card_and_nothing_is_lost(
    pytestconfig: pytest.Config,
    play: Callable[..., str],
    status: Callable[[], dict[str, Any]],
    fleet: dict[str, Any],
    service: dict[str, Any],
    on: Callable[[str], Host],
    load: SteadyLoad,
) -> None:
    before = programs(on, fleet)
    environment = {**service["environment"], "TTS_MAX_CHARACTERS": "500"}
    play("site", services=changed_services(pytestconfig, service["name"], environment=environment))
    after = programs(on, fleet)
    own = {one["program"] for one in fleet["instances"] if one["service"] == service["name"]}
    for (host, program), pid in after.items():
        assert (before[host, program] != pid) == (program in own), (host, program)
    assert set(states(status()).values()) == {"ready"}


def test_a_broken_release_stops_at_the_first_card_and_is_put_back(
    pytestconfig: pytest.Config,
    play: Callable[..., str],
    status: Callable[[], dict[str, Any]],
    fleet: dict[str, Any],
    service: dict[str, Any],
    on: Callable[[str], Host],
    load: SteadyLoad,
) -> None:
    before = programs(on, fleet)
    with pytest.raises(CommandFailed, match="no_such_module"):
        play("site", services=changed_services(pytestconfig, service["name"], app="no_such_module:app"))
    after = programs(on, fleet)
    assert len([key for key in before if before[key] != after[key]]) == 1
    wait_until(lambda: set(states(status()).values()) == {"ready"}, 10)


def test_the_fleet_serves_all_slots_after_all_that(
    play: Callable[..., str],
    url: Callable[..., str],
    service: dict[str, Any],
    client_addresses: list[str],
) -> None:
    play("site")
    clients = [client_addresses[number % 20] for number in range(service["capacity"] + 8)]
    answers = post_at_once(url("audio-generate", service=service["name"]), clients, {"text": "完"})
    assert Counter(answer.status for answer in answers) == {200: service["capacity"], 503: 8}

"""What was rolled out runs where the inventory says, and answers."""

from collections.abc import Callable
from typing import Any

import httpx
from testinfra.host import Host

from testbed.speech import seconds_of_speech, speak

from ..ledger import peaks, runs
from ..load import post_at_once


def test_every_instance_is_a_running_program(on: Callable[[str], Host], instance: dict[str, Any]) -> None:
    status = on(instance["host"]).run("supervisorctl status %s", instance["program"])
    assert "RUNNING" in status.stdout, on(instance["host"]).run(
        "tail -50 /var/log/gpufleet/%s.log", instance["program"]
    )


def test_a_host_runs_the_programs_of_the_fleet_and_no_other(
    on: Callable[[str], Host], fleet: dict[str, Any], gpu_host: dict[str, Any]
) -> None:
    listed = on(gpu_host["name"]).run("supervisorctl status").stdout.splitlines()
    wanted = {instance["program"] for instance in fleet["instances"] if instance["host"] == gpu_host["name"]}
    assert {line.split()[0] for line in listed} == wanted


def test_every_instance_listens_on_its_port(on: Callable[[str], Host], instance: dict[str, Any]) -> None:
    assert on(instance["host"]).socket(f"tcp://0.0.0.0:{instance['port']}").is_listening


def test_only_the_gateways_reach_an_instance(
    on: Callable[[str], Host], fleet: dict[str, Any], instance: dict[str, Any]
) -> None:
    connect = f"timeout 5 bash -c '</dev/tcp/{instance['address'].strip('[]')}/{instance['port']}'"
    other = next(name for name in fleet["hosts"] if name != instance["host"])
    for gateway in fleet["gateways"]:
        assert on(gateway["host"]).run(connect).rc == 0
    assert "Connection refused" in on(other).run(connect).stderr


def test_the_firewall_stays_where_an_operator_flushes_the_tables_of_all(
    on: Callable[[str], Host], gpu_host: dict[str, Any]
) -> None:
    host = on(gpu_host["name"])
    table = "nft list table inet gpufleet"
    before = host.check_output(table)
    assert host.service("gpufleet-firewall").is_enabled
    for verb in ("restart", "reload", "restart"):
        host.check_output(f"systemctl {verb} nftables")
        # systemd brings ours back after nftables.service, and systemctl does not wait for that.
        assert host.check_output(f"timeout 5 sh -c 'until {table}; do sleep 0.1; done' 2>/dev/null") == before
    host.check_output("systemctl stop nftables && systemctl start gpufleet-firewall")
    assert host.check_output(table) == before


def test_an_instance_sees_its_own_card_only_and_is_not_root(
    on: Callable[[str], Host], instance: dict[str, Any]
) -> None:
    host = on(instance["host"])
    pid = host.run("supervisorctl pid %s", instance["program"]).stdout.strip()
    # As its own user: root in a container may not look into the processes of others.
    variables = host.run("runuser -u gpufleet -- cat /proc/%s/environ", pid).stdout.split("\0")
    assert f"CUDA_VISIBLE_DEVICES={instance['device']}" in variables
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in variables
    assert f"SLOT_GUARD_INSTANCE={instance['id']}" in variables


def test_supervisor_is_started_at_boot(on: Callable[[str], Host], fleet: dict[str, Any]) -> None:
    for host in fleet["hosts"]:
        assert on(host).service("supervisor").is_running
        assert on(host).service("supervisor").is_enabled


def test_the_gateway_serves_its_port(on: Callable[[str], Host], gateway: dict[str, Any]) -> None:
    assert on(gateway["host"]).service("nginx").is_running
    assert on(gateway["host"]).service("nginx").is_enabled
    health = httpx.get(f"{gateway['url']}/health", trust_env=False)
    assert health.status_code == 200


def test_every_service_speaks(fleet: dict[str, Any], url: Callable[..., str]) -> None:
    for service in fleet["services"]:
        assert seconds_of_speech(speak(url("", service=service), "你好,世界")) > 0.5


def test_a_redirect_of_a_service_leads_back_to_the_gateway(url: Callable[..., str]) -> None:
    asked = url("audio-generate")
    answer = httpx.post(f"{asked}/", json={"text": "转"}, trust_env=False)
    assert (answer.status_code, answer.headers["location"]) == (307, asked)


def test_a_request_runs_once_on_one_card(
    fleet: dict[str, Any], url: Callable[..., str], client_addresses: list[str], ledger: Callable[[], list[Any]]
) -> None:
    service = next(name for name, given in fleet["services"].items() if "TTS_LEDGER" in given["environment"])
    (answer,) = post_at_once(url("audio-generate", service=service), client_addresses[:1], {"text": "一次"})
    assert answer.status == 200
    assert runs(ledger()) == {answer.request: 1}
    assert list(peaks(ledger()).values()) == [1]

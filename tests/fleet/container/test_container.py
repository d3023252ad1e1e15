"""The gateway in a container does what the one of the host does, and the two take each other's place."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from testbed.shell import CommandFailed

from ..load import SteadyLoad, post_at_once
from ..operations import Inventory, Operator, Page, wait_until

STARTED = "docker container inspect --format '{{.Id}} {{.State.StartedAt}}' gpufleet-gateway"
FOLDER = "/etc/gpufleet-gateway"


@pytest.fixture(scope="module")
def host(on: Callable[[str], Host], fleet: dict[str, Any]) -> Host:
    return on(fleet["gateways"][0]["host"])


@pytest.fixture
def rolled_out(operator: Operator) -> Callable[[], str]:
    """`rolled_out()` brings the gateway to the inventory and returns what changed there."""

    def play() -> str:
        output = operator.play("site", "--limit", "gateways")
        (changed,) = re.findall(r"^gw +: ok=\d+ +changed=(\d+)", output, flags=re.MULTILINE)
        return output if changed != "0" else ""

    return play


@pytest.fixture
def served(
    url: Callable[..., str], client_addresses: list[str], service: dict[str, Any]
) -> Callable[[], Counter[int | None]]:
    """`served()` is how a burst ends that is twice the capacity."""

    def ask() -> Counter[int | None]:
        clients = client_addresses[: 2 * service["capacity"]]
        return Counter(answer.status for answer in post_at_once(url("audio-generate"), clients, {"text": "容器"}))

    return ask


def test_the_host_has_no_nginx_and_publishes_the_article_s_port(host: Host, fleet: dict[str, Any]) -> None:
    assert fleet["gateways"][0]["url"].endswith(":9080")
    assert not host.package("nginx").is_installed
    assert host.check_output("docker port gpufleet-gateway") == "9999/tcp -> 0.0.0.0:9080"
    assert not host.socket("tcp://9999").is_listening


def test_what_nginx_refuses_is_put_back_by_a_reload_which_no_client_notices(
    host: Host, inventory: Inventory, operator: Operator, url: Callable[..., str], client_addresses: list[str]
) -> None:
    started = host.check_output(STARTED)
    with inventory.edited("group_vars/all/container.yml") as variables:
        variables["gateway_trusted_proxies"] = ["no-address"]
    load = SteadyLoad(url("audio-generate"), client_addresses[:3], {"text": "容器"})
    with load, pytest.raises(CommandFailed, match="keeps its old configuration"):
        operator.play("site", "--limit", "gateways")
    assert {answer.status for answer in load.answers} == {200}
    assert host.check_output(STARTED) == started
    assert host.check_output(f"ls -A {FOLDER}").split() == ["Dockerfile", "docker-compose.yml", "nginx.conf"]


def test_a_second_rollout_changes_nothing(rolled_out: Callable[[], str]) -> None:
    assert rolled_out() == ""


def test_the_container_comes_back_with_its_engine(host: Host, fleet: dict[str, Any]) -> None:
    """After reloads too, which Docker must not take for a stop."""
    page = Page(fleet["gateways"][0]["url"])
    host.check_output("systemctl restart docker")
    wait_until(page.answers, 10)


def test_what_a_killed_worker_held_is_counted_anew(
    host: Host, fleet: dict[str, Any], served: Callable[[], Counter[int | None]]
) -> None:
    """The program that sees to that is the host's: it reads the container's log and signals nginx."""
    zones = "cat /run/gpufleet-gateway/zones/*.conf"
    before = host.check_output(zones)
    host.check_output(f"kill -9 $(pgrep --parent $(cat {fleet['nginx']['pid_file']}) | head -1)")
    wait_until(lambda: host.check_output(zones) != before, 5)
    wait_until(lambda: served() == {200: fleet["capacity"], 503: fleet["capacity"]}, 10)


def test_container_and_native_nginx_take_each_other_s_place_and_a_drain_lasts(
    host: Host,
    fleet: dict[str, Any],
    inventory: Inventory,
    operator: Operator,
    rolled_out: Callable[[], str],
    served: Callable[[], Counter[int | None]],
) -> None:
    capacity = fleet["capacity"]
    left = capacity - fleet["instances"][0]["slots"]
    operator.play("drain", target="gpu01:0")
    with inventory.edited("hosts.yml") as groups:
        del groups["gateways"]["hosts"]["gw"]["gateway_container"]
    assert rolled_out()
    native = Page(f"http://{fleet['gateways'][0]['address']}:{fleet['port']}")
    native.wait_for("drained", fleet["instances"][0]["id"])
    assert host.service("nginx").is_enabled
    assert host.check_output("docker ps --all --quiet") == ""
    assert "gpufleet" not in host.check_output("docker images")
    assert not host.file(FOLDER).exists
    assert not host.file("/etc/logrotate.d/gpufleet-gateway").exists

    inventory.restore()
    assert rolled_out()
    assert not host.service("nginx").is_enabled
    assert not host.service("nginx").is_running
    for path in ("/etc/nginx/nginx.conf", "/etc/systemd/system/nginx.service.d/gpufleet.conf"):
        assert not host.file(path).exists
    assert served() == {200: left, 503: 2 * capacity - left}
    operator.play("undrain", target="gpu01:0")
    assert operator.document("doctor")["exit_code"] == 0

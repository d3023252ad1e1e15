# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""The host part of preflight: what is refused, what is let through, and what is said."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpufleet.core.plugins.modules import host_check
from ansible_collections.gpufleet.core.plugins.modules.host_check import GIGABYTE, Listener, Space

TWO_CARDS = (
    "GPU 0: NVIDIA GeForce RTX 3090 (UUID: GPU-aaaa)\n"
    "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb)\n"
    "  MIG 1g.5gb     Device  0: (UUID: MIG-cccc)\n"
)
INSTANCE = {"program": "gpufleet-tts-0", "id": "tts-gpu01-0", "service": "tts", "port": 12321, "device": "0"}
OUR_UID = 998
OURS = Listener(OUR_UID, ("gunicorn (7)",))


@pytest.mark.parametrize(
    "os_release",
    [
        'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_ID="12"\nID=debian\n',
        "ID=debian\nVERSION_ID=13\n",
        'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="22.04"\n',
        'ID=ubuntu\nVERSION_ID="24.04"\n',
    ],
)
def test_supported_systems_pass(os_release: str) -> None:
    assert host_check.system_faults(os_release, True, 0, (3, 9)) == []


@pytest.mark.parametrize(
    ("os_release", "shown"),
    [("ID=debian\nVERSION_ID=11", "debian 11"), ("ID=rocky\nVERSION_ID=12", "rocky 12"), ("", "")],
)
def test_other_systems_are_refused(os_release: str, shown: str) -> None:
    assert host_check.system_faults(os_release, True, 0, (3, 11)) == [
        f"operating system = '{shown}': not supported. Use debian 12, debian 13, ubuntu 22.04, ubuntu 24.04."
    ]


def test_all_faults_of_a_system_are_named() -> None:
    faults = host_check.system_faults("ID=debian\nVERSION_ID=12", False, 1000, (3, 8))
    assert [line.split(" = ")[0] for line in faults] == ["init", "uid", "Python"]
    assert "older than 3.9" in faults[2]


def test_the_architecture_must_be_the_one_built_for() -> None:
    assert host_check.architecture_faults("x86_64", "x86_64") == []
    (line,) = host_check.architecture_faults("aarch64", "x86_64")
    assert line == (
        "architecture = 'aarch64': the conda environments are built for x86_64. "
        "Roll out from a controller with aarch64."
    )


@pytest.mark.parametrize(("uid", "count"), [(None, 0), (998, 0), (1000, 1)])
def test_the_account_of_a_person_is_not_taken_over(uid: int | None, count: int) -> None:
    assert len(host_check.user_faults("gpufleet", uid)) == count


def test_directories_of_one_file_system_share_its_space() -> None:
    wanted = {"/opt/conda": 10.0, "/opt/gpufleet": 2.0, "/var/log": 1.0}
    shared = Space(1, 11 * GIGABYTE)
    found = {"/opt/conda": shared, "/opt/gpufleet": shared, "/var/log": Space(2, GIGABYTE)}
    assert host_check.disk_faults(wanted, found) == [
        "preflight_free_gigabytes = {'/opt/conda': 10.0, '/opt/gpufleet': 2.0}: their file system has 11.0 GB free, "
        "and 12 GB are wanted. Free some space, or ask for less."
    ]
    assert host_check.disk_faults(wanted, {path: Space(1, 13 * GIGABYTE) for path in wanted}) == []


def test_a_directory_that_does_not_exist_yet_is_measured_where_it_will_be(tmp_path: Path) -> None:
    assert host_check.space_of(f"{tmp_path}/not/yet").device == tmp_path.stat().st_dev


@pytest.mark.parametrize(
    ("devices", "gpu_count"), [(["0", "1"], 2), (["0"], 1), (["1"], None), (["GPU-bbbb", "MIG-cccc", "0"], None)]
)
def test_cards_that_are_there_pass(devices: list[str], gpu_count: int | None) -> None:
    assert host_check.gpu_faults(TWO_CARDS, devices, gpu_count) == []


def test_missing_cards_are_named() -> None:
    remedy = "Correct the inventory, or look for the lost card in the kernel's log (NVRM, Xid)."
    assert host_check.gpu_faults(TWO_CARDS, ["0", "1", "2"], 3) == [
        f"gpu_count = 3: nvidia-smi -L lists 2 GPUs. {remedy}"
    ]
    assert host_check.gpu_faults(TWO_CARDS, ["0", "2", "GPU-dddd"], None) == [
        f"gpus, device = '{device}': nvidia-smi -L lists 2 GPUs, and not this one. {remedy}"
        for device in ("2", "GPU-dddd")
    ]
    assert host_check.gpu_faults("No devices found.\n", ["0"], 1)


@pytest.mark.parametrize("listeners", [{}, {12321: [OURS]}, {12321: [OURS, OURS]}, {22: [Listener(0, ("sshd (1)",))]}])
def test_free_ports_and_our_own_pass(listeners: dict[int, list[Listener]]) -> None:
    assert host_check.port_faults([INSTANCE], [], listeners, OUR_UID, False) == []


@pytest.mark.parametrize(
    ("listeners", "uid", "shown"),
    [
        ([Listener(1000, ("jupyter (9)",))], OUR_UID, "jupyter (9)"),
        ([OURS, Listener(0, ("nc (8)", "nc (9)"))], OUR_UID, "nc (8), nc (9)"),
        ([Listener(1000), Listener(1001)], OUR_UID, "a process of user 1000; a process of user 1001"),
        ([OURS], None, "gunicorn (7)"),
    ],
)
def test_a_port_of_somebody_else_is_refused(listeners: list[Listener], uid: int | None, shown: str) -> None:
    assert host_check.port_faults([INSTANCE], [], {12321: listeners}, uid, False) == [
        f"port of tts-gpu01-0 = 12321: taken by {shown}. Stop it, or move base_port of tts."
    ]


def test_the_gateways_port_may_be_held_by_our_nginx_only() -> None:
    nginx = {9999: [Listener(0, ("nginx (3)", "nginx (4)"))]}
    haproxy = {9999: [Listener(0, ("haproxy (5)",))]}
    assert host_check.port_faults([], [80, 9999], nginx, None, True) == []
    assert host_check.port_faults([], [9999], {80: nginx[9999]}, None, False) == []
    assert "taken by nginx (3), nginx (4)" in host_check.port_faults([], [80, 9999], nginx, None, False)[0]
    assert host_check.port_faults([], [9999], {9999: [Listener(0, ("docker-proxy (6)",))]}, None, True) == []
    assert host_check.port_faults([], [80, 9999], haproxy, None, True) == [
        "port of the gateway = 9999: taken by haproxy (5). "
        "Stop it, or move fleet_port, gateway_container.publish or gateway_tls.port."
    ]


INTERFACES = json.dumps(
    [
        {"ifname": "lo", "addr_info": [{"local": "127.0.0.1"}, {"local": "::1"}]},
        {"ifname": "eth0", "addr_info": [{"local": "10.0.0.100"}, {"local": "10.0.0.9"}]},
        {"ifname": "eth1"},
    ]
)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, ("eth0", [])),
        ("eth1", ("eth1", [])),
        (
            "eth7",
            (
                "eth7",
                [
                    "gateway_vip.interface = 'eth7': the host has no such network interface. "
                    "The host has eth0, eth1, lo."
                ],
            ),
        ),
    ],
)
def test_the_gateways_address_is_on_the_interface_of_its_own_one(wanted: str | None, found: Any) -> None:
    assert host_check.interface_for(INTERFACES, "10.0.0.100", wanted) == found


def test_an_address_that_the_host_does_not_have_is_a_fault() -> None:
    interface, (fault,) = host_check.interface_for(INTERFACES, "10.0.0.10", None)
    assert interface == ""
    assert fault.startswith("fleet_address = '10.0.0.10': on none of the host's network interfaces")


def test_this_machine_has_its_interface(capsys: pytest.CaptureFixture[str]) -> None:
    assert "127.0.0.66" in run(capsys, vip_beside="127.0.0.66")["msg"]
    assert "'eth77': the host has no such" in run(capsys, vip_beside="127.0.0.1", vip_interface="eth77")["msg"]
    assert "network interface" not in run(capsys, vip_beside="127.0.0.1").get("msg", "")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_real_listeners_are_found_with_user_and_process(listener: socket.socket) -> None:
    listen = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    command = [sys.executable, "-c", f"{listen}; input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        listeners = host_check.port_listeners()
        child.kill()
    for pid, held in ((child.pid, port), (os.getpid(), listener.getsockname()[1])):
        (found,) = listeners[held]
        assert found.uid == os.geteuid()
        assert [process.split()[-1] for process in found.processes] == [f"({pid})"]


def test_connections_are_not_listeners() -> None:
    header = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    rows = (
        "   0: 0100007F:3021 00000000:0000 0A 00000000:00000000 00:00000000 00000000   998        0 111 1\n"
        "   1: 0100007F:3022 0100007F:C000 01 00000000:00000000 00:00000000 00000000     0        0 222 1\n"
    )
    version_6 = (
        f"   2: {'0' * 32}:3023 {'0' * 32}:0000 0A 00000000:00000000 00:00000000 00000000     0        0 333 1\n"
    )
    assert host_check.listening_sockets(header + rows + version_6) == {"111": (0x3021, 998), "333": (0x3023, 0)}


def run(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    with patch_module_args({"host": "gpu01", **options}), contextlib.suppress(SystemExit):
        host_check.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("docker", "others", "faults"),
    [
        ("exit 0", [], []),
        ("[ $1 != compose ]", ["docker-compose"], []),
        ("[ $1 != compose ]", [], ["Docker has no compose"]),
        ("exit 1", ["docker-compose"], ["no Docker engine answers"]),
    ],
)
def test_a_container_needs_an_engine_and_its_compose(
    docker: str,
    others: list[str],
    faults: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("docker", *others):
        (tmp_path / name).write_text(f"#!/bin/sh\n{docker}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = [line for line in run(capsys, gateway_image="nginx").get("faults", []) if "gateway_container" in line]
    assert [line.split("'nginx': ")[1].split(". ")[0] for line in found] == faults


def test_all_faults_of_a_host_come_in_one_message(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = listener.getsockname()[1]
    nvidia_smi(tmp_path, monkeypatch, "echo 'GPU 0: Card (UUID: GPU-aaaa)'")
    result = run(
        capsys,
        instances=[{**INSTANCE, "port": port}],
        gpu_count=2,
        architecture="vax",
        free_gigabytes={"/opt/conda": 1e9},
    )
    assert result["failed"]
    message = result["msg"]
    assert message.startswith("The host is refused; nothing was changed there.\n")
    assert f"\nhost gpu01: port of tts-gpu01-0 = {port}: taken by " in message
    for variable in ("gpu_count = 2", "architecture = ", "preflight_free_gigabytes = "):
        assert f"\nhost gpu01: {variable}" in message
    assert message.splitlines()[1:] == result["faults"]


def test_a_driver_that_does_not_fit_its_library_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    result = run(capsys, instances=[INSTANCE], gpu_count=1)
    assert "nvidia-smi -L = 'exit code 18': it says: Failed to initialize NVML: Driver/library" in result["msg"]


@pytest.mark.parametrize(("instances", "warned"), [([INSTANCE], True), ([], False)])
def test_a_gpu_host_without_nvidia_smi_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    instances: list[dict[str, Any]],
    warned: bool,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    warn = Mock()
    monkeypatch.setattr(host_check.AnsibleModule, "warn", warn)
    run(capsys, instances=instances)
    told = [call.args for call in warn.call_args_list]
    assert told == ([("host gpu01: there is no nvidia-smi, so its GPUs were not checked",)] if warned else [])


def test_what_only_gpu_hosts_need_is_not_asked_of_a_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, gateway_ports=[9999], architecture="vax", free_gigabytes={"/opt/conda": 1e9})
    assert "architecture" not in result.get("msg", "")
    assert "preflight_free_gigabytes" not in result.get("msg", "")


@pytest.mark.parametrize(
    "found", [[], ["monitored"], ["monitored", "monitors"], ["certified", "has_vip"]], ids=" ".join
)
def test_what_was_left_on_a_host_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: list[str]
) -> None:
    monkeypatch.setattr(host_check, "check", lambda module, present: [])
    traces = {name: tmp_path / name for name in host_check.TRACES}
    monkeypatch.setattr(host_check, "TRACES", traces)
    for name in found:
        traces[name].touch()
    result = run(capsys)
    assert [name for name in traces if result[name]] == found


def test_the_ports_of_the_programs_that_the_host_has_now() -> None:
    command = "command = gunicorn --bind 0.0.0.0:12321 a:a\n"
    text = f"[program:gpufleet-a-0]\n{command}[program:gpufleet-b-0]\ncommand = sleep 9\n"
    assert host_check.program_ports(text) == {"gpufleet-a-0": 12321}
    assert host_check.program_ports("") == host_check.program_ports("[program:theirs]\n" + command) == {}


def test_a_program_that_would_move_away_from_its_clients_is_refused() -> None:
    moving = {"program": "gpufleet-tts-0", "id": "tts-gpu01-0", "service": "tts", "port": 12400}
    assert host_check.moving_port_faults([moving], {}) == []
    assert host_check.moving_port_faults([moving], {"gpufleet-tts-0": 12400, "gpufleet-tts-1": 12321}) == []
    (line,) = host_check.moving_port_faults([moving], {"gpufleet-tts-0": 12321})
    assert line.startswith("port of tts-gpu01-0 = 12400: its program is at 12321, and until it is replaced clients are")
    assert line.endswith("Leave base_port of tts as it was, or move it with -e move_ports=true when few ask.")

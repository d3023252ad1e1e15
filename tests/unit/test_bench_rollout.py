"""The roll-out's benchmark: what its contenders say is read right, and its figures become a document."""

from pathlib import Path

import pytest
import yaml

from bench.report import table
from bench.rollout.contenders import CONTENDERS, GPUFLEET, MITOGEN, PYINFRA, STOCK, Unexpected
from bench.rollout.fleet import Size, control_group, cpu_seconds_of, inventory, write_inventory
from bench.rollout.report import TITLES, document, summary
from bench.rollout.scenarios import QUICK, Extent

CONTAINER = "9f" * 32
RECAP = """PLAY RECAP *********
gpu01                      : ok=12   changed={}    unreachable=0    failed={}    skipped=0    rescued=0    ignored=0
gw                         : ok=13   changed=2    unreachable={}    failed=0    skipped=0    rescued=0    ignored=0
"""
TOTALS = """--> Results:
    Operation                 Hosts   Success   Error   No Change
    Write etc/nginx/nginx.conf 1       1         -       -
    Grand total               9       {}        {}       8
"""


def test_ansibles_recap_is_read() -> None:
    assert GPUFLEET.changes(RECAP.format(3, 0, 0)) == 5
    for failed, unreachable in ((1, 0), (0, 1)):
        with pytest.raises(Unexpected, match="PLAY RECAP"):
            GPUFLEET.changes(RECAP.format(3, failed, unreachable))
    with pytest.raises(Unexpected, match="no such playbook"):
        GPUFLEET.changes("no such playbook")


def test_pyinfras_totals_are_read() -> None:
    assert PYINFRA.changes(TOTALS.format(1, "-")) == 1
    assert PYINFRA.changes(TOTALS.format("-", "-")) == 0
    with pytest.raises(Unexpected, match="Grand total"):
        PYINFRA.changes(TOTALS.format(1, 2))
    with pytest.raises(Unexpected, match="An exception occurred"):
        PYINFRA.changes("An exception occurred")


def test_a_containers_control_group() -> None:
    one = f"9:name=systemd:/docker/{CONTAINER}/init.scope\n2:cpu,cpuacct:/docker/{CONTAINER}\n0::/docker/x\n"
    assert control_group(one) == Path(f"/sys/fs/cgroup/cpuacct/docker/{CONTAINER}")
    two = f"0::/system.slice/docker-{CONTAINER}.scope/init.scope\n"
    assert control_group(two) == Path(f"/sys/fs/cgroup/system.slice/docker-{CONTAINER}.scope")


def test_processor_time_of_a_control_group(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 2000000\n")
    assert cpu_seconds_of(tmp_path) == 2.5
    (tmp_path / "cpuacct.usage").write_text("1500000000\n")
    assert cpu_seconds_of(tmp_path) == 1.5


def test_an_inventory_is_written_as_large_as_asked(tmp_path: Path) -> None:
    size = Size("twenty", 20, 1, "172.31.97")
    written = yaml.safe_load((write_inventory(size, tmp_path / "inventory") / "hosts.yml").read_text())
    assert written == inventory(size)
    addresses = [
        host["ansible_host"] for group in ("gateways", "gpu_servers") for host in written[group]["hosts"].values()
    ]
    assert addresses == [f"172.31.97.{number}" for number in range(10, 31)]
    assert (tmp_path / "inventory/group_vars/all/all.yml").resolve().name == "all.yml"


def test_the_slowest_takes_part_in_fewer_rounds_of_the_large_fleet() -> None:
    extent = Extent(rounds=3, slowest_rounds=2)

    def rounds(contender: object, size: Size) -> int:
        return sum(extent.takes_part(contender, size, turn) for turn in range(extent.rounds))  # type: ignore[arg-type]

    assert {one.name: (rounds(one, extent.small), rounds(one, extent.large)) for one in CONTENDERS} == {
        GPUFLEET.name: (3, 3),
        STOCK.name: (3, 2),
        MITOGEN.name: (3, 3),
        PYINFRA.name: (3, 3),
    }
    assert {QUICK.small.network, QUICK.large.network} == {extent.small.network, extent.large.network}


def test_the_document_holds_medians_with_their_noise() -> None:
    figures = {
        one.name: {"seconds": [3.0 * place, 1.0 * place, 2.0 * place], "serving": [place, place, place]}
        for place, one in enumerate(CONTENDERS, 1)
    }
    results = {**dict.fromkeys(TITLES, figures), "from bare": {GPUFLEET.name: {"four": [44.4], "twenty": [99.5]}}}
    machine = {
        "date": "2026-11-25T21:00+00:00",
        "minutes": 20,
        "cores": 2,
        "cpu": "a CPU",
        "memory_gib": 24,
        "kernel": "6",
        "load_before": 0.1,
        "versions": {"pyinfra": "3"},
    }
    text = document(machine, results, ["rollout.svg"])
    assert table(["", "serving after, s", "whole run, s"], [[GPUFLEET.name, "1.0", "2.0 (1.0 to 3.0)"]]) in text
    assert "44 s on four hosts, 100 s on twenty hosts" in text and "busy" not in text
    busy = document({**machine, "load_before": 5.5, "note": "Cut short."}, results, [])
    assert "**The machine was busy" in busy and "\n\nCut short.\n\n" in busy
    assert "2 s, 2.0 times as fast as a stock ansible.cfg; pyinfra takes 8 s." in summary(results)[0]

"""What a host tells of its GPUs: from the driver's own words to Prometheus' text. The driver here is simulated."""

import subprocess
import sys
from pathlib import Path

import gpu_metrics
import pytest

from testbed.hosts import NVIDIA_SMI

LISTING = (
    "GPU 0: NVIDIA GeForce RTX 3090 (UUID: GPU-aaaa)\n"
    "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb)\n"
    "  MIG 1g.5gb     Device  0: (UUID: MIG-cccc)\n"
)
KERNEL_LOG = (
    "1767225600.123456 gpu01 kernel: NVRM: Xid (PCI:0000:3b:00): 31, pid=4711, name=python, Ch 00000008\n"
    "1767225700.000001 gpu01 kernel: NVRM: Xid (PCI:0000:3b:00): 31, pid=4712, name=python, Ch 00000008\n"
    "1767225800.500000 gpu01 kernel: NVRM: Xid (PCI:0000:af:00): 79, pid='<unknown>', GPU has fallen off the bus.\n"
    "1767225900.000000 gpu01 kernel: NVRM: GPU at PCI:0000:af:00: GPU-bbbb\n"
)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A function that makes two cards, or those given, and a kernel's log the only ones of this host."""

    def make(cards=("GPU-aaaa", "GPU-bbbb"), log=""):
        (tmp_path / "cards").write_text("".join(f"{card}\n" for card in cards))
        script = NVIDIA_SMI.read_text().replace("/etc/nvidia-smi-simulated", str(tmp_path / "cards"))
        (tmp_path / "kernel").write_text(log)
        for name, text in (("nvidia-smi", script), ("journalctl", f"#!/bin/sh\ncat {tmp_path}/kernel\n")):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return make


def written(folder, *devices):
    """Run the program as the timer does; return what it wrote, or None."""
    output = folder / "gpufleet.prom"
    command = [sys.executable, gpu_metrics.__file__, "--output", str(output), *devices]
    subprocess.run(command, check=True, timeout=30)
    assert not list(folder.glob("*.new"))
    return output.read_text() if output.exists() else None


def test_everything_that_two_cards_tell(driver, tmp_path):
    driver(log=KERNEL_LOG)
    samples = [line for line in written(tmp_path, "0", "1").splitlines() if not line.startswith("#")]
    first, second = 'gpu="0",uuid="GPU-aaaa"', 'gpu="1",uuid="GPU-bbbb"'
    assert samples == [
        'gpufleet_gpu_present{device="0"} 1',
        'gpufleet_gpu_present{device="1"} 1',
        f"gpufleet_gpu_memory_used_bytes{{{first}}} 8589934592",
        f"gpufleet_gpu_memory_used_bytes{{{second}}} 8589934592",
        f"gpufleet_gpu_memory_total_bytes{{{first}}} 25769803776",
        f"gpufleet_gpu_memory_total_bytes{{{second}}} 25769803776",
        f"gpufleet_gpu_utilization_ratio{{{first}}} 0.5",
        f"gpufleet_gpu_utilization_ratio{{{second}}} 0.5",
        f"gpufleet_gpu_temperature_celsius{{{first}}} 61",
        f"gpufleet_gpu_temperature_celsius{{{second}}} 61",
        f"gpufleet_gpu_power_watts{{{first}}} 210.5",
        f"gpufleet_gpu_power_watts{{{second}}} 210.5",
        f"gpufleet_gpu_ecc_errors{{{first}}} 0",
        f"gpufleet_gpu_ecc_errors{{{second}}} 0",
        'gpufleet_gpu_xid_time_seconds{pci="0000:3b:00",xid="31"} 1767225700',
        'gpufleet_gpu_xid_time_seconds{pci="0000:af:00",xid="79"} 1767225800',
    ]


def test_what_a_card_does_not_tell_is_no_sample():
    found = gpu_metrics.readings("0, GPU-aaaa, 1, 2, [N/A], 40, [Not Supported], 7\n")
    assert [found[name] for name in ("utilization_ratio", "power_watts")] == [[], []]
    assert found["ecc_errors"] == [({"gpu": "0", "uuid": "GPU-aaaa"}, 7)]


def test_what_is_not_there_is_not_promised(driver, tmp_path):
    """A help line without samples would be one."""
    driver()
    assert "xid" not in written(tmp_path, "0")


def test_a_card_that_is_gone_is_told(driver, tmp_path):
    driver(cards=["GPU-aaaa"])
    text = written(tmp_path, "0", "1", "GPU-aaaa", "GPU-bbbb")
    present = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("gpufleet_gpu_present")]
    assert present == ["1", "0", "1", "0"]


def test_parts_of_a_card_are_known_by_their_uuid():
    assert gpu_metrics.presence(LISTING, ["0", "1", "2", "GPU-bbbb", "MIG-cccc", "MIG-dddd"]) == [
        ({"device": "0"}, 1),
        ({"device": "1"}, 1),
        ({"device": "2"}, 0),
        ({"device": "GPU-bbbb"}, 1),
        ({"device": "MIG-cccc"}, 1),
        ({"device": "MIG-dddd"}, 0),
    ]


@pytest.mark.parametrize("broken", ["exit 9", "exec sleep 60"])
def test_with_a_broken_driver_all_cards_are_gone(driver, tmp_path, monkeypatch, broken):
    driver()
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n# nvidia-smi, simulated\n{broken}\n")
    monkeypatch.setattr(gpu_metrics, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(sys, "argv", ["gpu_metrics", "--output", str(tmp_path / "out.prom"), "0", "1"])
    assert gpu_metrics.main() == 0
    samples = [line for line in (tmp_path / "out.prom").read_text().splitlines() if not line.startswith("#")]
    assert samples == ['gpufleet_gpu_present{device="0"} 0', 'gpufleet_gpu_present{device="1"} 0']


def test_without_the_driver_there_are_no_metrics(driver, tmp_path):
    driver()
    assert written(tmp_path, "0")
    Path(tmp_path, "nvidia-smi").unlink()
    assert written(tmp_path, "0") is None

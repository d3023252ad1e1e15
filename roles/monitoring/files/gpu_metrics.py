# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Metrics of a host's GPUs for the textfile collector of Prometheus' node exporter; a systemd timer runs it.

From nvidia-smi and, for the driver's Xid errors, the kernel's log of this boot. A host without nvidia-smi has no such
metrics; where it fails, the cards that the inventory names count as gone. Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

PATIENCE_SECONDS = 10
"""How long a program may take: with a broken driver, nvidia-smi hangs."""

MEBIBYTE = 1 << 20

READINGS = {
    "memory.used": ("memory_used_bytes", "Memory in use.", MEBIBYTE),
    "memory.total": ("memory_total_bytes", "Memory of the card.", MEBIBYTE),
    "utilization.gpu": ("utilization_ratio", "Share of the time in which it computed.", 0.01),
    "temperature.gpu": ("temperature_celsius", "Temperature of the chip.", 1),
    "power.draw": ("power_watts", "Power that it draws.", 1),
    "ecc.errors.uncorrected.volatile.total": ("ecc_errors", "Uncorrected memory errors since the driver began.", 1),
}
"""What nvidia-smi is asked for: metric, its meaning and the factor to its unit."""

LIST = ("nvidia-smi", "-L")
READ = ("nvidia-smi", f"--query-gpu={','.join(('index', 'uuid', *READINGS))}", "--format=csv,noheader,nounits")
KERNEL_LOG = ("journalctl", "--dmesg", "--boot", "--quiet", "--output=short-unix", "--grep=NVRM: Xid")

_LISTED = re.compile(r"^\s*(?:GPU (?P<index>\d+):|MIG\b).*\(UUID: (?P<uuid>[^)]+)\)", re.MULTILINE)
_XID = re.compile(r"^(?P<seconds>\d+)\.\d+ .*NVRM: Xid \(PCI:(?P<pci>[\da-fA-F:.]+)\): (?P<xid>\d+)", re.MULTILINE)

Sample = tuple[Mapping[str, str], float]


def said(*command: str) -> str:
    """What a program prints; nothing where it fails or takes too long."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_SECONDS)
        if done.returncode == 0:
            return done.stdout.decode(errors="replace")
    return ""


def family(name: str, meaning: str, samples: Iterable[Sample]) -> str:
    """A gauge in Prometheus' text format 0.0.4; nothing where there are no samples."""
    lines = [f"# HELP gpufleet_gpu_{name} {meaning}", f"# TYPE gpufleet_gpu_{name} gauge"]
    for labels, value in samples:
        shown = ",".join(f'{label}="{text}"' for label, text in labels.items())
        lines.append(f"gpufleet_gpu_{name}{{{shown}}} {value:.12g}")
    return "".join(f"{line}\n" for line in lines) if len(lines) > 2 else ""


def presence(listing: str, devices: Iterable[str]) -> list[Sample]:
    """Whether nvidia-smi lists the devices, each an index or a UUID."""
    listed = {name for match in _LISTED.finditer(listing) for name in match.groups()}
    return [({"device": device}, int(device in listed)) for device in devices]


def readings(table: str) -> dict[str, list[Sample]]:
    """Samples by metric, of what READ prints. What a card does not tell is `[N/A]` there."""
    found: dict[str, list[Sample]] = {name: [] for name, _, _ in READINGS.values()}
    for row in table.splitlines():
        index, uuid, *values = row.split(", ")
        for (name, _, factor), value in zip(READINGS.values(), values):
            with contextlib.suppress(ValueError):
                found[name].append(({"gpu": index, "uuid": uuid}, float(value) * factor))
    return found


def xid_times(log: str) -> list[Sample]:
    """When each kind of Xid error was last seen on a card, in Unix time."""
    last = {(match["pci"], match["xid"]): float(match["seconds"]) for match in _XID.finditer(log)}
    return [({"pci": pci, "xid": xid}, seconds) for (pci, xid), seconds in sorted(last.items())]


def text(devices: Iterable[str]) -> str:
    """All metrics of this host."""
    found = readings(said(*READ))
    return "".join(
        (
            family("present", "1 while nvidia-smi lists a device of the inventory.", presence(said(*LIST), devices)),
            *(family(name, meaning, found[name]) for name, meaning, _ in READINGS.values()),
            family("xid_time_seconds", "When an Xid error was last seen, in Unix time.", xid_times(said(*KERNEL_LOG))),
        )
    )


def main() -> int:
    """Write the metrics, or remove them where there is no nvidia-smi any more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="file that the textfile collector reads")
    parser.add_argument("devices", nargs="*", help="indices and UUIDs of the inventory's devices")
    options = parser.parse_args()
    if not shutil.which("nvidia-smi"):
        options.output.unlink(missing_ok=True)
        return 0
    unfinished = options.output.with_suffix(".new")
    unfinished.write_text(text(options.devices), encoding="utf-8")
    unfinished.chmod(0o644)
    unfinished.replace(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

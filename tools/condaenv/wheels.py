"""The pip: part of an environment: wheels, resolved by pip inside the environment and installed by hash."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from installer import install
from installer.destinations import SchemeDictionaryDestination
from installer.sources import WheelFile
from packaging.utils import canonicalize_name, parse_wheel_filename

from tools.condaenv import CondaError


def resolve_wheels(prefix: Path, requirements: Sequence[str], glibc: str) -> list[str]:
    """Lines name==version --hash=... for all that the requirements need beyond the packages in prefix."""
    if not requirements:
        return []
    options = ("--quiet", "--dry-run", "--only-binary", ":all:", "--report", "-")
    report = json.loads(_pip(prefix, "install", *options, *requirements))
    lines = []
    for item in report["install"]:
        name, version = canonicalize_name(item["metadata"]["name"]), item["metadata"]["version"]
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if not digest:
            raise CondaError(f"the package index gives no sha256 for {name} {version}: use one that does")
        require_glibc(item["download_info"]["url"].rsplit("/", 1)[1], glibc)
        lines.append(f"{name}=={version} --hash=sha256:{digest}")
    return sorted(lines)


def require_glibc(wheel: str, glibc: str) -> None:
    """Refuse a wheel (its file name) that runs on the controller and not on hosts with this glibc."""
    tags = parse_wheel_filename(wheel)[3]
    needs = [tuple(map(int, found)) for tag in tags for found in re.findall(r"manylinux_(\d+)_(\d+)_", tag.platform)]
    if needs and min(needs) > tuple(map(int, glibc.split("."))):
        needed = ".".join(map(str, min(needs)))
        raise CondaError(
            f"{wheel} needs glibc {needed} and the fleet has {glibc}: ask for an older release in environment.yml, "
            f"or say what all hosts have: --virtual __glibc={needed}"
        )


def install_wheels(prefix: Path, final: Path, lock: Path, wheels: Path) -> None:
    """Download the wheels of a pip.lock into the folder wheels, by hash; install them into prefix, for use at final."""
    wheels.mkdir()
    options = ("--quiet", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels))
    _pip(prefix, "download", *options, "--requirement", str(lock))
    packages = site_packages(prefix)
    python = packages.parent.name
    scheme = {
        "purelib": str(packages),
        "platlib": str(packages),
        "scripts": str(prefix / "bin"),
        "headers": str(prefix / "include" / "site" / python),
        "data": str(prefix),
    }
    for wheel in sorted(wheels.iterdir()):
        destination = SchemeDictionaryDestination(scheme, interpreter=str(final / "bin" / python), script_kind="posix")
        with WheelFile.open(wheel) as source:
            source.validate_record()
            install(source, destination, additional_metadata={"INSTALLER": b"gpufleet\n"})
    _pip(prefix, "check")


def site_packages(prefix: Path) -> Path:
    """Folder of the Python packages; CondaError when the environment has no Python."""
    found = sorted(prefix.glob("lib/python3.*/site-packages"))
    if not found:
        raise CondaError("the environment has no Python: add it to environment.yml")
    return found[0]


def _pip(prefix: Path, *arguments: str) -> str:
    """Run the controller's pip for the environment's Python, which sees no packages but its own; return its output."""
    shielded = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-m", "pip", "--python", str(prefix / "bin" / "python"), "--no-input", *arguments]
    done = subprocess.run(command, env={**shielded, "PYTHONNOUSERSITE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise CondaError(f"pip {arguments[0]} failed:\n{done.stderr.strip()}\n{done.stdout.strip()}".rstrip())
    return done.stdout

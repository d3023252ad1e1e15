"""What rolls out: gpufleet, the same playbook under two other ways of running Ansible, and pyinfra.

All of them start with no open connection and end on the same hosts with the same files: what one has rolled out, the
others find unchanged.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ansible_collections.gpufleet.core.plugins.module_utils.archive import read_sidecar
from ansible_collections.gpufleet.core.plugins.module_utils.release_ids import code_release, conda_release

from bench import PROJECT
from bench.rollout.fleet import GATEWAY, VARIABLES, Fleet

HERE = Path(__file__).parent
GATEWAY_FILES = (
    "etc/gpufleet-agent.json",
    "etc/supervisor/conf.d/fleet-agent.conf",
    "etc/systemd/system/supervisor.service.d/fleet-agent.conf",
    "etc/tmpfiles.d/gpufleet-gateway.conf",
    "etc/systemd/system/nginx.service.d/gpufleet.conf",
    "etc/nginx/nginx.conf",
)
GPU_FILES = (
    "etc/supervisor/conf.d/gpufleet.conf",
    "etc/systemd/system/supervisor.service.d/gpufleet.conf",
    "etc/gpufleet-firewall.nft",
    "etc/systemd/system/gpufleet-firewall.service",
)


class Unexpected(RuntimeError):
    """A contender did not do what it was asked to; the message holds what it said."""


class Contender:
    """One way to roll out."""

    name: str

    def prepare(self, fleet: Fleet) -> None:
        """Take from a fleet that was rolled out what the contender needs."""

    def command(self, fleet: Fleet, limit: Sequence[str] = ()) -> list[str]:
        """The command line that rolls out, to all hosts or to those of `limit`."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """What it needs in its environment."""
        return {}

    def changes(self, output: str) -> int:
        """How many changes a run says that it made; Unexpected where it did not come to its end."""
        raise NotImplementedError


@dataclass(frozen=True)
class Playbook(Contender):
    """site.yml, run by Ansible with these settings."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)

    def command(self, fleet: Fleet, limit: Sequence[str] = ()) -> list[str]:
        """The command line that rolls out, to all hosts or to those of `limit`."""
        command = [sys.executable, "-m", "ansible", "playbook", "--inventory", str(fleet.inventory)]
        return [*command, *(["--limit", ",".join(limit)] if limit else []), str(PROJECT / "site.yml")]

    def environment(self) -> Mapping[str, str]:
        """Its settings."""
        return {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), **self.settings}

    def changes(self, output: str) -> int:
        """How many changes a run says that it made."""
        recap = re.findall(r"^\S+ +: ok=\d+ +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", output, re.MULTILINE)
        if not recap or any(int(unreachable) + int(failed) for _, unreachable, failed in recap):
            raise Unexpected("\n".join(output.splitlines()[-40:]))
        return sum(int(changed) for changed, *_ in recap)


class Mitogen(Playbook):
    """site.yml, run with Mitogen's strategy plugin."""

    def environment(self) -> Mapping[str, str]:
        """Its settings, and where the plugin is."""
        package = importlib.util.find_spec("ansible_mitogen")
        assert package and package.origin
        folder = Path(package.origin).parent / "plugins" / "strategy"
        return {**super().environment(), "ANSIBLE_STRATEGY_PLUGINS": str(folder)}


class Pyinfra(Contender):
    """pyinfra with a deploy of the same steps; the rendered files are those that gpufleet has put on the hosts."""

    name = "pyinfra"

    def prepare(self, fleet: Fleet) -> None:
        """Fetch the files, and write pyinfra's inventory."""
        folder = fleet.folder / "pyinfra"
        shutil.rmtree(folder, ignore_errors=True)
        for name, process in fleet.processes.items():
            for file in GATEWAY_FILES if name == GATEWAY else GPU_FILES:
                copy = folder / name / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(process / "root" / file, copy)
        groups: dict[str, list[tuple[str, dict[str, object]]]] = {"gateways": [], "gpu_servers": []}
        for host in fleet.bed.hosts:
            data = {
                "ssh_hostname": host.address,
                "ssh_user": "root",
                "ssh_key": str(fleet.bed.state / "id_ed25519"),
                "ssh_known_hosts_file": str(fleet.bed.state / "known_hosts"),
                "ssh_strict_host_key_checking": "yes",
                "ssh_allow_agent": False,
                "ssh_look_for_keys": False,
                "files": str(folder / host.name),
            }
            if host.name == GATEWAY:
                groups["gateways"].append((host.name, {**data, "releases": agent_releases()}))
            else:
                programs = (folder / host.name / GPU_FILES[0]).read_text()
                ports = [int(port) for port in re.findall(r"--bind \S+:(\d+)", programs)]
                groups["gpu_servers"].append((host.name, {**data, "releases": gpu_releases(), "ports": ports}))
        lines = (f"{name} = {members!r}\n" for name, members in groups.items())
        (folder / "inventory.py").write_text("".join(lines))

    def command(self, fleet: Fleet, limit: Sequence[str] = ()) -> list[str]:
        """The command line that rolls out, to all hosts or to those of `limit`."""
        limits = [word for name in limit for word in ("--limit", name)]
        inventory = str(fleet.folder / "pyinfra" / "inventory.py")
        return [sys.executable, "-m", "pyinfra", "--yes", *limits, inventory, str(HERE / "pyinfra_deploy.py")]

    def changes(self, output: str) -> int:
        """How many changes a run says that it made."""
        totals = re.search(r"^ *Grand total +(?:\d+|-) +(\d+|-) +(\d+|-) +(?:\d+|-) *$", output, re.MULTILINE)
        if not totals or totals[2] != "-":
            raise Unexpected("\n".join(output.splitlines()[-40:]))
        return 0 if totals[1] == "-" else int(totals[1])


def gpu_releases() -> list[dict[str, str]]:
    """What gpufleet unpacks on every GPU host: where, which link shows there, and the archive with its hash."""
    (name, service), (conda, environment) = (next(iter(VARIABLES[key].items())) for key in ("services", "conda_envs"))
    return [
        _with_hash(conda_release(conda, environment["lock"], "/opt/conda", str(PROJECT))),
        _with_hash(code_release(name, service["code"], "/opt/gpufleet", str(PROJECT))),
    ]


def agent_releases() -> list[dict[str, str]]:
    """What gpufleet unpacks on the gateway."""
    return [_with_hash(code_release("fleet-agent", {"source": "service/agent"}, "/opt/gpufleet", str(PROJECT)))]


def _with_hash(release: dict[str, str]) -> dict[str, str]:
    sidecar = read_sidecar(Path(release["archive"]))
    assert sidecar, release
    return {key: release[key] for key in ("id", "root", "path", "link", "archive")} | {"sha256": sidecar["sha256"]}


GPUFLEET = Playbook("gpufleet")
STOCK = Playbook("stock ansible.cfg", {"ANSIBLE_CONFIG": str(HERE / "stock.cfg")})
MITOGEN = Mitogen("gpufleet with Mitogen", {"ANSIBLE_STRATEGY": "mitogen_linear"})
PYINFRA = Pyinfra()
CONTENDERS: tuple[Contender, ...] = (GPUFLEET, STOCK, MITOGEN, PYINFRA)

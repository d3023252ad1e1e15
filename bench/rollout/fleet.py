"""The hosts that are rolled out to: containers of the test bed, their inventories, and what is seen of them."""

from __future__ import annotations

import json
import re
import shutil
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from bench import PROJECT
from testbed import hosts, image
from testbed.engine import this_machine
from testbed.shell import run

FOLDER = PROJECT / ".cache" / "bench" / "rollout"
GATEWAY = "gw"
PORT = 9999
INOTIFY_LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")
KNOWN_BY_GATEWAY = ("etc/nginx/nginx.conf", "etc/gpufleet-agent.json")
VARIABLES: Mapping[str, Any] = {
    "services": {
        "tts": {
            "route": "/AIVoice/TTS/CosyVoice2/",
            "app": "tts_service.app:app",
            "code": {"source": "service/tts"},
            "conda_env": "tts",
            "environment": {"TTS_ENGINE": "simulated", "TTS_SIMULATED_SECONDS": "0.1"},
            "client_limit": 2,
            "smoke": {"path": "audio-generate", "body": {"text": "Hello. 你好。"}},
        }
    },
    "conda_envs": {"tts": {"lock": ".cache/envs/tts"}},
}


@dataclass(frozen=True)
class Size:
    """What a fleet is made of: one gateway, and so many GPU hosts of so many GPUs each, on a /24 of its own."""

    name: str
    gpu_hosts: int
    gpus: int
    network: str

    @property
    def names(self) -> list[str]:
        """The GPU hosts."""
        return [f"gpu{number:02}" for number in range(1, self.gpu_hosts + 1)]


def inventory(size: Size) -> dict[str, Any]:
    """The inventory of a fleet, as its hosts.yml holds it."""
    state = PROJECT / ".cache" / "testbed" / f"bench-{size.name}"
    addresses = {name: {"ansible_host": f"{size.network}.{10 + place}"} for place, name in enumerate(size.names, 1)}
    return {
        "gateways": {"hosts": {GATEWAY: {"ansible_host": f"{size.network}.10"}}},
        "gpu_servers": {"vars": {"gpu_count": size.gpus}, "hosts": addresses},
        "testbed": {
            "children": {"gateways": {}, "gpu_servers": {}},
            "vars": {
                "testbed_fleet": f"bench-{size.name}",
                "testbed_subnet": f"{size.network}.0/24",
                "ansible_user": "root",
                "ansible_ssh_private_key_file": str(state / "id_ed25519"),
                "ansible_ssh_common_args": f'-o IdentitiesOnly=yes -o UserKnownHostsFile="{state / "known_hosts"}"',
            },
        },
    }


def write_inventory(size: Size, folder: Path) -> Path:
    """Write the inventory of a fleet into a folder, over the project's own group_vars."""
    shutil.rmtree(folder, ignore_errors=True)
    variables = folder / "group_vars" / "all"
    variables.mkdir(parents=True)
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory(size), sort_keys=False))
    (variables / "all.yml").symlink_to(PROJECT / "group_vars" / "all.yml")
    (variables / "bench.yml").write_text(yaml.safe_dump(dict(VARIABLES), allow_unicode=True))
    return folder


class Fleet:
    """A fleet that is up, bare at first."""

    def __init__(self, size: Size) -> None:
        """Write the inventories; nothing is started yet."""
        self.size = size
        self.folder = FOLDER / size.name
        self.inventory = write_inventory(size, self.folder / "inventory")
        self.newest = size.names[-1]
        before = replace(size, gpu_hosts=size.gpu_hosts - 1)
        self.inventory_before = write_inventory(before, self.folder / "before" / "inventory")
        """The inventory without the newest host."""
        self.bed = hosts.read_inventory(self.inventory)
        self._engine = this_machine()

    def up(self) -> None:
        """Have all hosts run; those that run are left alone."""
        hosts.up(self.bed, self._engine, image.build(self._engine))

    def down(self) -> None:
        """Remove all of it, and the engine if it was started for it."""
        print(run(sys.executable, "-m", "testbed", "down", "--inventory", str(self.inventory)), end="")

    def read_gateway(self) -> dict[str, str]:
        """What makes the gateway know its instances."""
        root = self.processes[GATEWAY] / "root"
        return {name: (root / name).read_text() for name in KNOWN_BY_GATEWAY}

    def put_back_gateway(self, files: Mapping[str, str]) -> None:
        """Have the gateway know the instances that it knew when its files were read."""
        root = self.processes[GATEWAY] / "root"
        for name, text in files.items():
            (root / name).write_text(text)
        self._engine.docker("exec", f"{self.bed.network}-{GATEWAY}", "systemctl", "reload", "nginx")

    def renew_newest(self) -> None:
        """Put a bare machine in the place of the newest host."""
        (host,) = (host for host in self.bed.hosts if host.name == self.newest)
        self._engine.docker("rm", "--force", "--volumes", self.bed.container(host))
        self.up()

    @property
    def instances(self) -> list[str]:
        """Ids of the instances."""
        return [f"tts-{name}-{gpu}" for name in self.size.names for gpu in range(self.size.gpus)]

    def serves(self, *instances: str) -> bool:
        """Tell whether instances are in the gateway's upstream, which then listens for them, and ready on its page."""
        unix = (self.processes[GATEWAY] / "net" / "unix").read_text()
        if not all(f"/{instance}.sock\n" in unix for instance in instances):
            return False
        states = self._states()
        return all(states.get(instance) == "ready" for instance in instances)

    def _states(self) -> dict[str, str]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{self.size.network}.10:{PORT}/cluster/status", timeout=5) as answer:
                page = json.load(answer)
        except OSError:
            return {}
        return {instance["id"]: instance["state"] for instance in page["instances"]}

    @property
    def processes(self) -> dict[str, Path]:
        """By host its first process in /proc, through which its files, sockets and control group are seen."""
        names = {self.bed.container(host): host.name for host in self.bed.hosts}
        listing = self._engine.docker("inspect", "--format", "{{.Name}} {{.State.Pid}}", *names)
        found = (line.split() for line in listing.splitlines())
        return {names[name.removeprefix("/")]: Path("/proc", pid) for name, pid in found}

    def cpu_seconds(self) -> float:
        """Processor time that all hosts have used since they were started."""
        return sum(cpu_seconds_of(control_group((path / "cgroup").read_text())) for path in self.processes.values())


def control_group(text: str) -> Path:
    """The folder that counts a container's processor time, from the text of /proc/PID/cgroup."""
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in text.splitlines())}
    one = next((name for name in paths if "cpuacct" in name.split(",")), None)
    path = paths[one or ""]
    # The container's own group, not the one in it that systemd has put its first process into.
    container = re.match(r".*[0-9a-f]{64}[^/]*", path)
    return Path("/sys/fs/cgroup", "cpuacct" if one else "", (container[0] if container else path).lstrip("/"))


def cpu_seconds_of(group: Path) -> float:
    """Processor time of a control group and all below it."""
    if (group / "cpuacct.usage").exists():
        return int((group / "cpuacct.usage").read_text()) / 1e9
    usage = re.search(r"^usage_usec (\d+)$", (group / "cpu.stat").read_text(), re.MULTILINE)
    assert usage, group
    return int(usage[1]) / 1e6


@contextmanager
def _room_for_systemd() -> Iterator[None]:
    """Let 25 systemds of one user watch files: each takes 5 of the kernel's 128, and boots degraded without them."""
    found = int(INOTIFY_LIMIT.read_text())
    INOTIFY_LIMIT.write_text(str(max(found, 1024)))
    try:
        yield
    finally:
        INOTIFY_LIMIT.write_text(str(found))


@contextmanager
def fleets(*sizes: Size) -> Iterator[list[Fleet]]:
    """Fleets of these sizes, up and bare; they are gone after the block."""
    engine = this_machine()
    with ExitStack() as stack:
        stack.enter_context(_room_for_systemd())
        made = []
        for size in sizes:
            engine.start()
            fleet = Fleet(size)
            fleet.down()  # what a run that was killed has left
            stack.callback(fleet.down)
            engine.start()
            fleet.up()
            made.append(fleet)
        yield made

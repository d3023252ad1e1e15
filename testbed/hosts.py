"""The hosts of one inventory as containers: brought up, looked at and taken down.

The inventory says everything: the hosts and their addresses (`ansible_host`), their GPUs (`gpu_count` or `gpus`), and
the test bed's own variables `testbed_fleet` (a name), `testbed_subnet` and, per host, `testbed_publish` (a list of
docker port mappings) and `testbed_engine` (whether it has a Docker engine of its own, in which `debian:bookworm` is
the host's own system). Ansible reads it, so groups and group_vars count as they do in a rollout.
"""

import hashlib
import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from testbed import PROJECT, STATE
from testbed.engine import Engine
from testbed.image import with_engine
from testbed.shell import CommandFailed, provide, run, tar

BOOT_SECONDS = 60
STOP_SECONDS = 15
FLEET_LABEL = "gpufleet.fleet"
DEFINITION_LABEL = "gpufleet.definition"
# What systemd needs to run as process 1 without privileges.
SYSTEMD_OPTIONS = ("--tmpfs", "/run", "--tmpfs", "/run/lock", "--stop-signal", "SIGRTMIN+3")
# A firewall and addresses of its own, and programs that go before others, as every server can have.
CAPABILITIES = ("--cap-add", "NET_ADMIN", "--cap-add", "SYS_NICE")
# What an engine in a host needs. Not all privileges: a virtual machine may lack SYS_RESOURCE itself.
ENGINE_OPTIONS = (
    *("--cap-add", "ALL", "--cap-drop", "SYS_RESOURCE", "--volume", "/var/lib/docker"),
    *(word for name in ("seccomp", "apparmor", "systempaths") for word in ("--security-opt", f"{name}=unconfined")),
)
# Its only image, which no registry has to give: what the host itself has, without the engine.
ENGINE_IMAGE = "debian:bookworm"
IMPORT = f"""docker image inspect {ENGINE_IMAGE} >/dev/null 2>&1 || tar --create --directory=/ --one-file-system \\
    --exclude='./usr/*bin/docker*' --exclude='./usr/bin/containerd*' --exclude='./var/cache/apt/*' . \\
    | docker import - {ENGINE_IMAGE}"""
CGROUP_OPTIONS = {
    # The read-only bind is not recursive: the controllers mounted below it stay writable.
    "1": ("--volume", "/sys/fs/cgroup:/sys/fs/cgroup:ro"),
    "2": ("--cgroupns", "host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw"),
}
NVIDIA_SMI = Path(__file__).with_name("nvidia-smi-simulated")

Item = TypeVar("Item")
Result = TypeVar("Result")


class BedFailed(RuntimeError):
    """The test bed is not as asked for; the message names the host or variable."""


@dataclass(frozen=True)
class Host:
    """A host to be: `cards` are the UUIDs of its simulated GPUs, `publish` docker port mappings, `engine` its own."""

    name: str
    address: str
    cards: tuple[str, ...] = ()
    publish: tuple[str, ...] = ()
    engine: bool = False


@dataclass(frozen=True)
class Bed:
    """The hosts of one inventory, on a network of their own."""

    fleet: str
    subnet: str
    hosts: tuple[Host, ...]

    @property
    def network(self) -> str:
        """Name of the docker network, and what the containers' names begin with."""
        return f"gpufleet-{self.fleet}"

    @property
    def state(self) -> Path:
        """Folder with the keys: `id_ed25519` opens all hosts, `known_hosts` tells them apart."""
        return STATE / self.fleet

    def container(self, host: Host) -> str:
        """Return the name of a host's container."""
        return f"{self.network}-{host.name}"


def read_inventory(inventory: Path) -> Bed:
    """Return the test bed that an inventory asks for."""
    # -m ansible: the one beside this Python, whatever PATH says.
    command = (sys.executable, "-m", "ansible", "inventory", "--inventory", str(inventory), "--list")
    listing = json.loads(run("env", f"ANSIBLE_CONFIG={PROJECT / 'ansible.cfg'}", *command))
    variables: dict[str, dict[str, Any]] = listing["_meta"]["hostvars"]
    if not variables:
        raise BedFailed(f"{inventory}: there is no host")
    for name, values in variables.items():
        for key in ("ansible_host", "testbed_fleet", "testbed_subnet"):
            if key not in values:
                raise BedFailed(f"{inventory}: host {name} has no variable {key}")
    shared = next(iter(variables.values()))
    hosts = (
        Host(
            name=name,
            address=values["ansible_host"],
            cards=simulated_cards(f"{shared['testbed_fleet']}/{name}", values),
            publish=tuple(values.get("testbed_publish", ())),
            engine=values.get("testbed_engine", False),
        )
        for name, values in sorted(variables.items())
    )
    return Bed(shared["testbed_fleet"], shared["testbed_subnet"], tuple(hosts))


def simulated_cards(seed: str, variables: dict[str, Any]) -> tuple[str, ...]:
    """Return the UUIDs of a host's cards, in the order of their index, from `gpu_count` or `gpus`.

    An index that nothing names is a card left out on purpose: it is in the machine all the same. `seed` makes the
    UUIDs that the inventory does not give, the same every time.
    """
    uuids: dict[int, str] = {}
    for place, card in enumerate(variables.get("gpus") or range(int(variables.get("gpu_count", 0)))):
        entry = card if isinstance(card, dict) else {"device": card}
        device = str(entry["device"])
        if device.isdecimal():
            uuids.setdefault(int(device), "")
        else:
            uuids[int(entry.get("index", place))] = device
    return tuple(
        uuids.get(index) or f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'{seed}/{index}')}"
        for index in range(max(uuids, default=-1) + 1)
    )


def up(bed: Bed, engine: Engine, image: str) -> dict[str, str]:
    """Have all hosts run and answer over ssh; return for each what that took.

    It was running, or is now started, created, or replaced: a container of another recipe or with other keys.
    """
    provide({"ssh": "openssh-client", "ssh-keygen": "openssh-client"})
    bed.state.mkdir(parents=True, exist_ok=True)
    _make_key(bed.state / "id_ed25519", f"gpufleet {bed.fleet}")
    for host in bed.hosts:
        _make_key(_host_key(bed, host), host.name)
    known = (f"{host.address} {_public(_host_key(bed, host))}\n" for host in bed.hosts)
    (bed.state / "known_hosts").write_text("".join(known))
    if not engine.docker("network", "ls", "--quiet", "--filter", f"name=^{bed.network}$").strip():
        label = f"{FLEET_LABEL}={bed.fleet}"
        engine.docker("network", "create", "--subnet", bed.subnet, "--label", label, bed.network)
    wanted = {bed.container(host) for host in bed.hosts}
    _remove(engine, [name for name in _containers(engine, bed) if name not in wanted])
    cgroups = CGROUP_OPTIONS[engine.docker("info", "--format", "{{.CgroupVersion}}").strip()]

    def bring_up(host: Host) -> str:
        done = _run_container(bed, host, engine, image, cgroups)
        _wait_until_booted(bed, host)
        if host.engine:
            ssh(bed, host, IMPORT, seconds=120)
        return done

    return dict(zip((host.name for host in bed.hosts), _side_by_side(bring_up, bed.hosts), strict=True))


def down(bed: Bed, engine: Engine) -> list[str]:
    """Remove the hosts, their network and their keys; return the names of the containers that were there."""
    containers = sorted(_containers(engine, bed))
    _remove(engine, containers)
    networks = engine.docker("network", "ls", "--quiet", "--filter", f"label={FLEET_LABEL}={bed.fleet}").split()
    for network in networks:
        engine.docker("network", "rm", network)
    shutil.rmtree(bed.state, ignore_errors=True)
    return containers


def states(bed: Bed, engine: Engine) -> dict[str, str]:
    """Return the state of each host: absent, or docker's word for it (running, exited, …)."""
    found = _containers(engine, bed)
    return {host.name: found.get(bed.container(host), "absent") for host in bed.hosts}


def ssh(bed: Bed, host: Host, *command: str, seconds: float = 30) -> str:
    """Run a command on a host as Ansible would reach it, and return what it printed."""
    options = {
        "UserKnownHostsFile": bed.state / "known_hosts",
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "ConnectTimeout": 5,
    }
    arguments = [f"-o{name}={value}" for name, value in options.items()]
    key = str(bed.state / "id_ed25519")
    return run("ssh", "-F", "none", "-i", key, *arguments, f"root@{host.address}", *command, seconds=seconds)


def _containers(engine: Engine, bed: Bed) -> dict[str, str]:
    """Return the fleet's containers: name -> state."""
    form = "{{.Names}} {{.State}}"
    listing = engine.docker("ps", "--all", "--filter", f"label={FLEET_LABEL}={bed.fleet}", "--format", form)
    return dict(line.split(" ", 1) for line in listing.splitlines())


def _run_container(bed: Bed, host: Host, engine: Engine, image: str, cgroups: tuple[str, ...]) -> str:
    name = bed.container(host)
    files = {
        "root/.ssh/authorized_keys": _public(bed.state / "id_ed25519").encode(),
        "etc/ssh/ssh_host_ed25519_key": _host_key(bed, host).read_bytes(),
    }
    modes = {"etc/ssh/ssh_host_ed25519_key": 0o600}
    if host.cards:
        files["usr/local/bin/nvidia-smi"] = NVIDIA_SMI.read_bytes()
        files["etc/nvidia-smi-simulated"] = "".join(f"{card}\n" for card in host.cards).encode()
        modes["usr/local/bin/nvidia-smi"] = 0o755
    contents = tar(files, modes)
    options = ["--hostname", host.name, "--network", bed.network, "--ip", host.address, *SYSTEMD_OPTIONS]
    options += [*CAPABILITIES, *cgroups]
    if host.engine:
        image = with_engine(engine, image)
        options += ENGINE_OPTIONS
    options += [word for mapping in host.publish for word in ("--publish", mapping)]
    definition = hashlib.sha256(repr((image, options, contents)).encode()).hexdigest()
    label = f'{{{{.State.Status}}}} {{{{index .Config.Labels "{DEFINITION_LABEL}"}}}}'
    state = _containers(engine, bed).get(name)
    if state and engine.docker("inspect", "--format", label, name).split() == [state, definition]:
        if state == "running":
            return "running"
        engine.docker("start", name)
        return "started"
    if state:
        _remove(engine, [name])
    labels = ["--label", f"{FLEET_LABEL}={bed.fleet}", "--label", f"{DEFINITION_LABEL}={definition}"]
    engine.docker("create", "--name", name, *labels, *options, image)
    engine.docker("cp", "-", f"{name}:/", send=contents)
    engine.docker("start", name)
    return "replaced" if state else "created"


def _wait_until_booted(bed: Bed, host: Host) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        try:
            ssh(bed, host, "systemctl", "is-system-running", "--wait", seconds=BOOT_SECONDS)
            return
        except CommandFailed as error:
            # While it boots sshd is not there yet, or systemd's own socket is not.
            if time.monotonic() > deadline or "degraded" in str(error):
                raise BedFailed(f"{host.name} ({host.address}) did not come up: {error}") from error
            time.sleep(0.2)


def _remove(engine: Engine, containers: Iterable[str]) -> None:
    """Stop containers as an operator would a server, then remove them.

    A clean stop ends the ssh sessions from their far side. Ansible's kept connections would else stay open for
    minutes, and answer for a new host at the same address.
    """

    def stop_and_remove(name: str) -> None:
        engine.docker("stop", "--time", str(STOP_SECONDS), name)
        engine.docker("rm", "--volumes", name)

    _side_by_side(stop_and_remove, list(containers))


def _side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(work, items))


def _host_key(bed: Bed, host: Host) -> Path:
    return bed.state / f"{host.name}_host_key"


def _make_key(file: Path, comment: str) -> None:
    if not file.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(file))


def _public(key: Path) -> str:
    return key.with_name(f"{key.name}.pub").read_text().strip()

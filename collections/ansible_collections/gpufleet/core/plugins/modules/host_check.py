#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Ansible module: refuse a host that cannot run what the inventory wants of it, before anything is changed there."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import pwd
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import parse_programs
from ansible_collections.gpufleet.core.plugins.module_utils.system_files import read

DOCUMENTATION = r"""
module: host_check
short_description: Refuse a host that cannot run what the inventory wants of it
description:
  - Reads only, so it is the same in check mode. All faults of the host come in one message, each with the variable,
    its value, what is wrong and what to do.
  - Stays true after a roll-out, a port that our own program holds counts as free.
options:
  host:
    description: Inventory name of the host, for the message.
    type: str
    required: true
  instances:
    description: The host's instances out of C(fleet.instances). Without any, only what gateways need is checked.
    type: list
    elements: dict
    default: []
  gateway_ports:
    description: TCP ports that the host shall serve as a gateway.
    type: list
    elements: int
    default: []
  gateway_image:
    description: Image of the container that the host's gateway runs in, or what it is built from.
  vip_beside:
    description: The gateway's own address; on its network interface it shall have another one at times.
    type: str
  vip_interface:
    description: The network interface for that, where it shall be another one than that of O(vip_beside).
    type: str
  gpu_count:
    description: The inventory's C(gpu_count), where it names no single cards.
    type: int
  architecture:
    description: Machine architecture, as C(uname -m) says it, that the conda environments are built for.
    type: str
  free_gigabytes:
    description: Free space wanted by directory, which need not exist yet. Directories of one file system add up.
    type: dict
    default: {}
  move_ports:
    description:
      - Whether a program that the host has may move to another port. The gateway asks for it there at once, and it is
        not there before it was replaced.
    type: bool
    default: false
  user:
    description: Name of the system user that runs the instances.
    type: str
    default: gpufleet
author: gpufleet contributors
"""

EXAMPLES = r"""
- name: Refuse a host that cannot run its instances
  gpufleet.core.host_check:
    host: "{{ inventory_hostname }}"
    instances: "{{ fleet.instances | selectattr('host', 'eq', inventory_hostname) }}"
    free_gigabytes: {/opt/conda: 10}
"""

RETURN = r"""
faults:
  description: Everything that is wrong with the host, one line each.
  returned: failure
  type: list
  elements: str
vip_interface:
  description: The network interface that O(vip_beside) is on, or O(vip_interface); empty without O(vip_beside).
  returned: success
  type: str
program_ports:
  description: TCP ports of the programs that the role gpu_workers gave the host in its last run.
  returned: success
  type: list
  elements: int
monitored:
  description: Whether the role monitoring had the host tell its metrics.
  returned: success
  type: bool
monitors:
  description: Whether the role monitoring had the host collect metrics.
  returned: success
  type: bool
certified:
  description: Whether the role gateway had the host get a certificate from an ACME authority.
  returned: success
  type: bool
has_vip:
  description: Whether the role gateway had the host take part in the address of the gateways.
  returned: success
  type: bool
"""

#: ID of /etc/os-release and its VERSION_IDs.
SYSTEMS = {"debian": ("12", "13"), "ubuntu": ("22.04", "24.04")}
PYTHON = (3, 9)
GIGABYTE = 1 << 30
#: Where distributions let the accounts of people begin: UID_MIN of login.defs.
FIRST_PERSON = 1000
GATEWAY_CONFIGURATIONS = (Path("/etc/nginx/nginx.conf"), Path("/etc/gpufleet-gateway/nginx.conf"))
#: Who may hold a port of our own gateway: nginx itself, or what leads into its container.
GATEWAY_PROCESSES = ("nginx ", "docker-proxy ")
PROGRAMS = Path("/etc/supervisor/conf.d/gpufleet.conf")
#: What shows that a host has been told to do something, which it may have to be told to leave.
TRACES = {
    "monitored": Path("/etc/systemd/system/prometheus-node-exporter.service.d/gpufleet.conf"),
    "monitors": Path("/etc/systemd/system/prometheus.service.d/gpufleet.conf"),
    "certified": Path("/etc/letsencrypt/renewal-hooks/deploy/gpufleet"),
    "has_vip": Path("/etc/gpufleet-vip.conf"),
}

_LISTED_GPU = re.compile(r"^\s*(?P<kind>GPU|MIG)\b.*\(UUID: (?P<uuid>[^)]+)\)", re.MULTILINE)
_TCP_LISTEN = "0A"  # state in /proc/net/tcp, proc(5)


def fault(variable: str, value: object, problem: str, remedy: str) -> str:
    """Write one fault."""
    return f"{variable} = {value!r}: {problem}. {remedy}."


def system_faults(os_release: str, is_systemd: bool, uid: int, python: tuple[int, int]) -> list[str]:
    """Check what every host needs: a supported system that runs systemd, root, and a Python for the modules.

    :param os_release: text of /etc/os-release.
    """
    lines = (line.partition("=") for line in os_release.splitlines())
    values = {name: value.strip("\"'") for name, _, value in lines}
    system, version = values.get("ID", ""), values.get("VERSION_ID", "")
    supported = ", ".join(f"{name} {version}" for name, versions in SYSTEMS.items() for version in versions)
    faults = []
    if version not in SYSTEMS.get(system, ()):
        faults.append(fault("operating system", f"{system} {version}".strip(), "not supported", f"Use {supported}"))
    if not is_systemd:
        faults.append(fault("init", "not systemd", "services cannot be started at boot", "Boot the host with systemd"))
    if uid != 0:
        faults.append(fault("uid", uid, "not root", "Let ansible_user become root (ansible_become)"))
    if python < PYTHON:
        found, wanted = (".".join(map(str, version)) for version in (python, PYTHON))
        remedy = "Point ansible_python_interpreter to a newer one"
        faults.append(fault("Python", found, f"older than {wanted}", remedy))
    return faults


def architecture_faults(found: str, wanted: str) -> list[str]:
    """Check that the environments that the controller builds run here."""
    if found == wanted:
        return []
    remedy = f"Roll out from a controller with {found}"
    return [fault("architecture", found, f"the conda environments are built for {wanted}", remedy)]


def user_faults(name: str, uid: int | None) -> list[str]:
    """Check that the instances' user is none of a person; ``uid`` is None where there is no such user yet."""
    if uid is None or uid < FIRST_PERSON:
        return []
    return [fault("user", name, f"exists as an account of a person (uid {uid})", "Rename or remove that account")]


@dataclass(frozen=True)
class Space:
    """Free bytes of the file system, told apart by its device number, that a directory is or will be on."""

    device: int
    free: int


def disk_faults(wanted: Mapping[str, float], found: Mapping[str, Space]) -> list[str]:
    """Check free space, in gigabytes by directory; what shares a file system shares its space."""
    faults = []
    for device in sorted({space.device for space in found.values()}):
        needs = {path: wanted[path] for path, space in found.items() if space.device == device}
        free = min(space.free for space in found.values() if space.device == device) / GIGABYTE
        if sum(needs.values()) > free:
            problem = f"their file system has {free:.1f} GB free, and {sum(needs.values()):g} GB are wanted"
            faults.append(fault("preflight_free_gigabytes", needs, problem, "Free some space, or ask for less"))
    return faults


def gpu_faults(listing: str, devices: Iterable[str], gpu_count: int | None) -> list[str]:
    """Check the inventory's cards against ``nvidia-smi -L``. A card that the inventory leaves out is no fault."""
    listed = [(match["kind"], match["uuid"]) for match in _LISTED_GPU.finditer(listing)]
    count = sum(kind == "GPU" for kind, _ in listed)
    uuids = {uuid for _, uuid in listed}
    problem = f"nvidia-smi -L lists {count} GPUs"
    remedy = "Correct the inventory, or look for the lost card in the kernel's log (NVRM, Xid)"
    if gpu_count is not None:
        return [fault("gpu_count", gpu_count, problem, remedy)] if gpu_count > count else []
    missing = (device for device in devices if not (int(device) < count if device.isdigit() else device in uuids))
    return [fault("gpus, device", device, problem + ", and not this one", remedy) for device in missing]


@dataclass(frozen=True)
class Listener:
    """A listening socket: the user that opened it, and the processes that hold it as ``name (pid)``.

    A container's root without CAP_SYS_PTRACE does not see the processes of other users; the user it always sees.
    """

    uid: int
    processes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Name the listener in a fault."""
        return ", ".join(self.processes) or f"a process of user {self.uid}"


def port_faults(
    instances: Iterable[Mapping[str, object]],
    gateway_ports: Iterable[int],
    listeners: Mapping[int, list[Listener]],
    instances_uid: int | None,
    ours: bool,
) -> list[str]:
    """Check that every port is free or held by ourselves.

    :param listeners: who listens, by port.
    :param instances_uid: the user of the instances, who runs nothing else; None where it does not exist yet.
    :param ours: whether the host's nginx serves our configuration.
    """
    faults = []
    for instance in instances:
        port = int(str(instance["port"]))
        strangers = [listener for listener in listeners.get(port, ()) if listener.uid != instances_uid]
        if strangers:
            problem = f"taken by {'; '.join(map(str, strangers))}"
            remedy = f"Stop it, or move base_port of {instance['service']}"
            faults.append(fault(f"port of {instance['id']}", port, problem, remedy))
    for port in gateway_ports:
        strangers = [
            listener
            for listener in listeners.get(port, ())
            if not (ours and all(process.startswith(GATEWAY_PROCESSES) for process in listener.processes))
        ]
        if strangers:
            problem = f"taken by {'; '.join(map(str, strangers))}"
            remedy = "Stop it, or move fleet_port, gateway_container.publish or gateway_tls.port"
            faults.append(fault("port of the gateway", port, problem, remedy))
    return faults


def interface_for(listing: str, address: str, wanted: str | None) -> tuple[str, list[str]]:
    """Return the network interface ``wanted``, or else the one that has an address; or what is wrong.

    :param listing: what ``ip -json address`` prints.
    """
    interfaces = {
        entry["ifname"]: {given.get("local") for given in entry.get("addr_info", ())} for entry in json.loads(listing)
    }
    there = f"The host has {', '.join(sorted(interfaces))}"
    if wanted is not None:
        problem = "the host has no such network interface"
        return wanted, [] if wanted in interfaces else [fault("gateway_vip.interface", wanted, problem, there)]
    for name, addresses in interfaces.items():
        if address in addresses:
            return name, []
    problem = "on none of the host's network interfaces, so the one for gateway_vip is not known"
    return "", [fault("fleet_address", address, problem, f"Correct it, or give gateway_vip.interface. {there}")]


def listening_sockets(table: str) -> dict[str, tuple[int, int]]:
    """Return port and user of the sockets that are listened at, by inode, from the text of /proc/net/tcp or tcp6."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {row[9]: (int(row[1].rpartition(":")[2], 16), int(row[7])) for row in rows if row[3] == _TCP_LISTEN}


def port_listeners(proc: Path = Path("/proc")) -> dict[int, list[Listener]]:
    """Return who listens, by port."""
    sockets: dict[str, tuple[int, int]] = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # IPv6 may be switched off
            sockets.update(listening_sockets((proc / "net" / table).read_text()))
    processes: dict[str, list[str]] = {inode: [] for inode in sockets}
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is not ours to see
            name = f"{(folder / 'comm').read_text().strip()} ({folder.name})"
            for inode in _socket_inodes(folder) & set(sockets):
                processes[inode].append(name)
    listeners: dict[int, list[Listener]] = {}
    for inode, (port, uid) in sockets.items():
        listeners.setdefault(port, []).append(Listener(uid, tuple(sorted(processes[inode]))))
    return listeners


def _socket_inodes(process: Path) -> set[str]:
    inodes = set()
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # just closed
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    return inodes


def space_of(path: str) -> Space:
    """Return the space for a directory that may not exist yet."""
    folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    return Space(folder.stat().st_dev, shutil.disk_usage(folder).free)


def uid_of(name: str) -> int | None:
    """Return a user's id, or None if there is no such user."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name).pw_uid
    return None


def list_gpus(module: AnsibleModule) -> tuple[str, list[str]]:
    """Return what ``nvidia-smi -L`` prints, or the faults that keep it from it."""
    code, output, error = module.run_command(["nvidia-smi", "-L"])
    if code == 0:
        return output, []
    said = (error + output).strip().splitlines() or ["nothing"]
    remedy = "Reboot after an update of the driver, or install the driver that matches its library"
    return "", [fault("nvidia-smi -L", f"exit code {code}", f"it says: {said[0].rstrip('.')}", remedy)]


def vip_interface(module: AnsibleModule) -> tuple[str, list[str]]:
    """Return the network interface of the gateways' address, or the faults."""
    beside = module.params["vip_beside"]
    if not beside:
        return "", []
    listing = module.run_command([module.get_bin_path("ip", required=True), "-json", "address"], check_rc=True)[1]
    return interface_for(listing, beside, module.params["vip_interface"])


def program_ports(text: str) -> dict[str, int]:
    """Return ports by program of a file; none where it is no such file: the role gpu_workers replaces it."""
    with contextlib.suppress(ValueError):
        programs = parse_programs(text, "gpufleet-").programs
        return {name: program.port for name, program in programs.items() if program.port is not None}
    return {}


def moving_port_faults(instances: Iterable[Mapping[str, object]], present: Mapping[str, int]) -> list[str]:
    """Check that no program moves to another port: from the gateway's part of a run until its own, nobody finds it.

    :param present: ports by program as they are now.
    """
    faults = []
    for instance in instances:
        old = present.get(str(instance["program"]), instance["port"])
        if old != instance["port"]:
            problem = f"its program is at {old}, and until it is replaced clients are refused"
            service = instance["service"]
            remedy = f"Leave base_port of {service} as it was, or move it with -e move_ports=true when few ask"
            faults.append(fault(f"port of {instance['id']}", instance["port"], problem, remedy))
    return faults


def is_our_gateway() -> bool:
    """Tell whether nginx has a configuration of ours, in a container or not."""
    return any("gpufleet" in path.read_text(errors="replace") for path in GATEWAY_CONFIGURATIONS if path.exists())


def docker_faults(module: AnsibleModule, image: str) -> list[str]:
    """Check that a container can be run: an engine that answers, and compose in either version."""
    remedy = "Install Docker and its compose, such as the packages docker.io and docker-compose, and start it"
    if not module.get_bin_path("docker") or module.run_command(["docker", "version"])[0]:
        return [fault("gateway_container", image, "no Docker engine answers", remedy)]
    if module.run_command(["docker", "compose", "version"])[0] and not module.get_bin_path("docker-compose"):
        return [fault("gateway_container", image, "Docker has no compose", remedy)]
    return []


def check(module: AnsibleModule, present: Mapping[str, int]) -> list[str]:
    """Look at the host and return all faults.

    :param present: ports by program as they are now.
    """
    wanted = module.params
    faults = system_faults(
        Path("/etc/os-release").read_text(encoding="utf-8"),
        Path("/run/systemd/system").is_dir(),
        os.geteuid(),
        sys.version_info[:2],
    )
    uid = uid_of(wanted["user"])
    faults += port_faults(wanted["instances"], wanted["gateway_ports"], port_listeners(), uid, is_our_gateway())
    if not wanted["move_ports"]:
        faults += moving_port_faults(wanted["instances"], present)
    if wanted["gateway_image"]:
        faults += docker_faults(module, wanted["gateway_image"])
    if not wanted["instances"]:
        return faults
    if wanted["architecture"]:
        faults += architecture_faults(platform.machine(), wanted["architecture"])
    faults += user_faults(wanted["user"], uid)
    free_gigabytes = {path: float(size) for path, size in wanted["free_gigabytes"].items()}
    faults += disk_faults(free_gigabytes, {path: space_of(path) for path in free_gigabytes})
    if module.get_bin_path("nvidia-smi"):
        listing, broken = list_gpus(module)
        devices = dict.fromkeys(instance["device"] for instance in wanted["instances"])
        faults += broken or gpu_faults(listing, devices, wanted["gpu_count"])
    else:
        module.warn(f"host {wanted['host']}: there is no nvidia-smi, so its GPUs were not checked")
    return faults


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "host": {"type": "str", "required": True},
            "instances": {"type": "list", "elements": "dict", "default": []},
            "gateway_ports": {"type": "list", "elements": "int", "default": []},
            "gateway_image": {"type": "str"},
            "vip_beside": {"type": "str"},
            "vip_interface": {"type": "str"},
            "gpu_count": {"type": "int"},
            "architecture": {"type": "str"},
            "free_gigabytes": {"type": "dict", "default": {}},
            "move_ports": {"type": "bool", "default": False},
            "user": {"type": "str", "default": "gpufleet"},
        },
        supports_check_mode=True,
    )
    present = program_ports(read(PROGRAMS) or "")
    interface, unfit = vip_interface(module)
    faults = [f"host {module.params['host']}: {line}" for line in (*check(module, present), *unfit)]
    if faults:
        module.fail_json(msg="\n".join(["The host is refused; nothing was changed there.", *faults]), faults=faults)
    found = {name: path.exists() for name, path in TRACES.items()}
    module.exit_json(changed=False, vip_interface=interface, program_ports=list(present.values()), **found)


if __name__ == "__main__":
    main()

"""The roll-out as a deploy of pyinfra: the steps of the roles, with pyinfra's own facts and parallelism.

Left out, because pyinfra has nothing of the kind: a check of what was unpacked against its manifest, putting back what
does not come up, drains and replacing card by card, the lock, the preflight. See contenders.py for its inventory.
"""

import shlex
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from pyinfra import host
from pyinfra.api.facts import FactBase
from pyinfra.facts.files import Directory
from pyinfra.operations import apt, files, server, systemd

DAY = 86400


class InstancesReady(FactBase):
    """Whether every instance answers that it is ready, by the first line of its answer."""

    def command(self, ports: list[int]) -> str:
        """Ask all of them in one shell."""
        request = "GET /_slot_guard/ready HTTP/1.0\\r\\n\\r\\n"
        ask = f"exec 3<>/dev/tcp/127.0.0.1/$port && printf '{request}' >&3 && head -n1 <&3"
        loop = f"for port in {' '.join(map(str, ports))}; do ({ask}) 2>/dev/null; done; true"
        return f"bash -c {shlex.quote(loop)}"

    @staticmethod
    def default() -> int:
        """None does where nothing listens."""
        return 0

    def process(self, output: list[str]) -> int:
        """Count those that do."""
        return sum(" 200 " in line for line in output)


def packages(*names: str) -> None:
    """Install packages; a package list that is a day old is fetched anew, as Ansible's apt module judges it."""
    lists = host.get_fact(Directory, path="/var/lib/apt/lists")
    yesterday = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(seconds=DAY)
    old = not lists or lists["mtime"] < yesterday
    apt.packages(
        name="Install packages", packages=list(names), no_recommends=True, update=old, cache_time=DAY if old else None
    )


def release(id: str, root: str, path: str, link: str, archive: str, sha256: str) -> None:
    """Bring an archive where its release is missing, and point the link at it."""
    if not host.get_fact(Directory, path=path):
        copy = f"/var/tmp/{Path(archive).name}"
        files.put(name=f"Bring {id}", src=archive, dest=copy)
        server.shell(
            name=f"Unpack {id}",
            commands=[
                f"echo '{sha256}  {copy}' | sha256sum --check --status",
                f"mkdir -p {root}/.tmp/{id} && tar -xzf {copy} -C {root}/.tmp/{id}",
                f"sync && mv {root}/.tmp/{id} {path} && rm -r {root}/.tmp {copy}",
            ],
        )
    files.link(name=f"Point at {id}", path=link, target=path)


def put(name: str, mode: str = "644") -> Any:
    """Bring one of the files that gpufleet rendered for this host."""
    return files.put(name=f"Write {name}", src=f"{host.data.files}/{name}", dest=f"/{name}", mode=mode)


def user(name: str, comment: str) -> None:
    """Have the user that programs run as."""
    server.user(
        name="Create the user",
        user=name,
        comment=comment,
        system=True,
        home=f"/var/lib/{name}",
        create_home=True,
        shell="/usr/sbin/nologin",
    )


def programs(*changes: Any) -> None:
    """Run what Supervisor's files say, if one of them changed."""
    systemd.service(name="Run Supervisor", service="supervisor", running=True, enabled=True)
    server.shell(
        name="Update the programs",
        commands=["supervisorctl update"],
        _if=lambda: any(change.did_change() for change in changes),
    )


if "gpu_servers" in host.groups:
    user("gpufleet", "GPU instances")
    packages("supervisor", "nftables")
    rules = put("etc/gpufleet-firewall.nft")
    unit = put("etc/systemd/system/gpufleet-firewall.service")
    systemd.daemon_reload(name="Read the firewall's unit", _if=unit.did_change)
    systemd.service(name="Have the firewall", service="gpufleet-firewall", running=True, enabled=True)
    systemd.service(
        name="Load the rules",
        service="gpufleet-firewall",
        reloaded=True,
        _if=lambda: rules.did_change() and not unit.did_change(),
    )
    for one in host.data.releases:
        release(**one)
    override = put("etc/systemd/system/supervisor.service.d/gpufleet.conf")
    systemd.daemon_reload(name="Read the unit", _if=override.did_change)
    files.directory(name="Have a folder for logs", path="/var/log/gpufleet", mode="750")
    file = put("etc/supervisor/conf.d/gpufleet.conf", "600")
    programs(file)
    ports = host.data.ports
    if host.get_fact(InstancesReady, ports=ports) < len(ports):
        server.shell(
            name="Wait until every instance is ready",
            commands=[
                f"for try in $(seq 300); do test $({InstancesReady().command(ports)} | grep -c ' 200 ') = {len(ports)} "
                "&& exit 0; sleep 0.2; done; exit 1"
            ],
        )

if "gateways" in host.groups:
    user("gpufleet-agent", "Agent of the GPU instances' gateway")
    packages("supervisor", "nginx")
    for one in host.data.releases:
        release(**one)
    override = put("etc/systemd/system/supervisor.service.d/fleet-agent.conf")
    systemd.daemon_reload(name="Read Supervisor's unit", _if=override.did_change)
    put("etc/gpufleet-agent.json")
    files.directory(name="Have a folder for logs", path="/var/log/gpufleet", mode="750")
    programs(put("etc/supervisor/conf.d/fleet-agent.conf", "600"))
    tmpfiles = put("etc/tmpfiles.d/gpufleet-gateway.conf")
    server.shell(
        name="Have the gateway's directories",
        commands=["systemd-tmpfiles --create /etc/tmpfiles.d/gpufleet-gateway.conf"],
        _if=tmpfiles.did_change,
    )
    override = put("etc/systemd/system/nginx.service.d/gpufleet.conf")
    systemd.daemon_reload(name="Read the unit", _if=override.did_change)
    configuration = put("etc/nginx/nginx.conf")
    systemd.service(name="Run nginx", service="nginx", running=True, enabled=True)
    server.shell(
        name="Serve the configuration",
        commands=["nginx -t -q && systemctl reload nginx"],
        _if=configuration.did_change,
    )

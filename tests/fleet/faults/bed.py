"""The fleet in Docker under test, and what can be broken on its hosts."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from testbed import PROJECT, hosts, image
from testbed.engine import Engine, this_machine
from testbed.fleet import describe
from testbed.shell import provide, run

from ..load import addresses_of_clients
from ..operations import Inventory, Operator, Page, wait_until
from .stage import GARBAGE, Stage

INVENTORY = Path(__file__).with_name("inventory")
CACHE = PROJECT / ".cache" / "faults"
FAULTY = Path(__file__).with_name("service") / "faulty.py"
CLOCK = Path(__file__).with_name("service") / "stepped_clock.c"
GATEWAY = "gw"


class Fleet(Stage):
    """A fleet on hosts in Docker, rolled out as an operator does."""

    def __init__(self, addresses: list[str]) -> None:
        """The fleet is up; `addresses` are those that clients may use."""
        fleet = describe(INVENTORY).fleet
        self.page = Page(fleet["gateways"][0]["url"])
        super().__init__(fleet, self.page.url, addresses)
        self.engine: Engine = this_machine()
        inventory = Inventory(INVENTORY, CACHE / "a" / "inventory", "group_vars/all/faults.yml")
        self.operator = Operator(inventory)
        bed = hosts.read_inventory(INVENTORY)
        self.containers = {host.name: bed.container(host) for host in bed.hosts}
        self.begin()

    # What a row does

    def sh(self, host: str, command: str) -> str:
        """Run a command as root on a host, not by way of its network; return what it printed."""
        return self.engine.docker("exec", self.containers[host], "bash", "-c", command).strip()

    def broken_by(self, host: str, break_it: str, mend: str) -> AbstractContextManager[None]:
        """Have something broken for the length of a block, by commands on a host."""
        return self.broken(partial(self.sh, host, break_it), partial(self.sh, host, mend))

    def away(self, host: str, leave: str, come_back: str) -> AbstractContextManager[None]:
        """Have a host be away for the length of a block, by docker's verbs."""
        docker, container = self.engine.docker, self.containers[host]
        return self.broken(partial(docker, leave, container), partial(docker, come_back, container))

    def frozen(self, host: str) -> AbstractContextManager[None]:
        return self.away(host, "pause", "unpause")

    def wait_until_out(self, *instances: str) -> None:
        """Return once the page says so."""
        wait_until(lambda: "ready" not in {self.states().get(name, "ready") for name in instances}, 10)

    def sick(self, host: str, gpu: int, fault: str) -> AbstractContextManager[None]:
        file = f"{self.service['environment']['SIMULATED_FAULTS']}/{self.instance(host, gpu)['device']}"
        return self.broken_by(host, f"mkdir -p $(dirname {file}) && echo {fault} >{file}", f"rm -f {file}")

    def garbled(self, host: str, gpu: int) -> AbstractContextManager[None]:
        target = self.instance(host, gpu)
        server = f'python3 -c "{GARBAGE.format(address="", port=target["port"])}"'
        return self.broken_by(
            host,
            f"supervisorctl stop {target['program']}; {server} >/dev/null 2>&1 & echo $! >/run/garbage.pid",
            f"kill $(cat /run/garbage.pid); supervisorctl start {target['program']}",
        )

    def reload_gateway(self) -> None:
        self.sh(GATEWAY, "systemctl reload nginx")

    def kill_gateway_workers(self, most: int | None = None) -> None:
        """Kill them, and wait until the gateway counts anew: until then their slots are lost."""
        zones = "cat /run/gpufleet-gateway/zones/*.conf"
        before = self.sh(GATEWAY, zones)
        chosen = f"| head -{most}" if most else ""
        with self.strike():
            self.sh(GATEWAY, f"kill -9 $(pgrep --parent $(cat /run/nginx.pid) {chosen})")
        wait_until(lambda: self.sh(GATEWAY, zones) != before, 10)
        self.note = f"the gateway counted anew {time.monotonic() - self.cause_gone:.1f} s after"

    def cut_gateway_power(self) -> None:
        with self.strike():
            self.engine.docker("restart", "--time", "0", self.containers[GATEWAY])

    def kill_worker(self, instance: dict[str, Any]) -> None:
        self.sh(instance["host"], f"kill -9 $(pgrep --parent $(supervisorctl pid {instance['program']}))")

    def kill_master(self, instance: dict[str, Any]) -> None:
        self.sh(instance["host"], f"kill -9 $(supervisorctl pid {instance['program']})")

    @contextmanager
    def programs_edited(self, host: str, edit: str, file: str = "gpufleet.conf") -> Iterator[None]:
        """Run a host's programs with a file that `sed` has edited; those that differ start anew, at the end too."""
        path = f"/etc/supervisor/conf.d/{file}"
        self.sh(host, f"cp -p {path} {path}.kept && sed -i {shlex.quote(edit)} {path} && supervisorctl update")
        try:
            yield
        finally:
            self.sh(host, f"mv {path}.kept {path} && supervisorctl update")

    def stepped_clock(self, host: str, seconds: int) -> str:
        """Set by how much the programs that preload it see another time of day; return the library's path there."""
        library = f"/usr/local/lib/{CLOCK.stem}.so"
        if self.sh(host, f"test -e {library} || echo missing"):
            provide({"cc": "gcc"})
            built = CACHE / f"{CLOCK.stem}.so"
            run("cc", "-shared", "-fPIC", "-O2", "-o", str(built), str(CLOCK), "-ldl")
            self.engine.docker("cp", str(built), f"{self.containers[host]}:{library}")
        self.sh(host, f"echo {seconds} >{library}.seconds")
        return library

    @contextmanager
    def full_disk(self, host: str, *folders: str, reopen: str) -> Iterator[None]:
        """Have no room in folders of a host; `reopen` has programs open their logs there.

        A small file system is mounted over each and filled up: nobody else's room is taken.
        """
        # From outside: a container may not mount.
        pid = self.engine.docker("inspect", "--format", "{{.State.Pid}}", self.containers[host]).strip()
        mounts = ("nsenter", "--target", pid, "--mount", "--pid", "bash", "-c")
        for folder in folders:
            options = f"size=64k,mode=$(stat -c %a {folder}),uid=$(stat -c %u {folder}),gid=$(stat -c %g {folder})"
            run(*mounts, f"mount -t tmpfs -o {options} tmpfs {folder}")
        try:
            self.sh(host, reopen)
            for folder in folders:
                self.sh(host, f"dd if=/dev/zero of={folder}/filler bs=4k 2>/dev/null || true")
            yield
        finally:
            for folder in folders:
                self.sh(host, f"rm -f {folder}/filler")  # supervisord ends when it cannot write out what it closes
                run(*mounts, f"umount --lazy {folder}")
            self.sh(host, reopen)

    @contextmanager
    def new_code(self) -> Iterator[None]:
        """Have the operator's inventory name code that is new, and does the same."""
        new = CACHE / "new_code"
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(CACHE / "code", new)
        with (new / "faulty.py").open("a") as file:
            file.write("# A release of its own.\n")
        with self.operator.inventory.service() as service:
            service["code"]["source"] = str(new.relative_to(PROJECT))
        try:
            yield
        finally:
            self.operator.inventory.restore()

    # What is asked after a row

    def states(self) -> dict[str, str]:
        """Likewise: the page cannot always be read."""
        try:
            return self.page.states()
        except (httpx.HTTPError, ValueError):
            return {}

    def idle_and_ready(self) -> bool:
        try:
            document = self.page.read()
        except (httpx.HTTPError, ValueError):
            return False
        totals = document.get("totals", {})
        return document["status"] == "healthy" and totals["in_flight"] == 0 and totals["ready"] == len(self.slots)

    def restart(self) -> None:
        print("(nginx is restarted, and the fleet rolled out) ", end="", file=sys.stderr, flush=True)
        self.sh(GATEWAY, "systemctl restart nginx")
        self.operator.inventory.restore()
        self.operator.play("site")

    def ledger(self) -> list[str]:
        file = self.service["environment"]["TTS_LEDGER"]
        with ThreadPoolExecutor() as pool:
            texts = pool.map(lambda host: self.sh(host, f"cat {file} 2>/dev/null || true"), self.fleet["hosts"])
            return [line for text in texts for line in text.splitlines()]


@contextmanager
def standing() -> Iterator[Fleet]:
    """A fleet of its own, rolled out for the length of a block; what was there already is used, and stays."""
    engine = this_machine()
    bed = hosts.read_inventory(INVENTORY)
    found = set(hosts.states(bed, engine).values()) == {"running"} if engine.answers() else False
    roll_out_code()
    with ExitStack() as stack:
        if not found:
            engine.start()
            stack.callback(hosts.down, bed, engine)
            hosts.up(bed, engine, image.build(engine))
        Operator(Inventory(INVENTORY, CACHE / "a" / "inventory", "group_vars/all/faults.yml")).play("site")
        gateway = next(host.address for host in bed.hosts if host.name == GATEWAY)
        yield Fleet(stack.enter_context(addresses_of_clients(gateway)))


def roll_out_code() -> None:
    """Put the service and its simulated faults together, where the inventory says that the code is."""
    code = CACHE / "code"
    shutil.rmtree(code, ignore_errors=True)
    shutil.copytree(PROJECT / "service" / "tts", code, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(FAULTY, code)

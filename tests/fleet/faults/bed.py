"""The fleet under test: its hosts, its clients, its ledgers, and the question whether all of its slots can be used."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from testbed import PROJECT, hosts, image
from testbed.engine import Engine, this_machine
from testbed.fleet import describe
from testbed.shell import provide, run

from ..background import Background
from ..ledger import SMOKE, Event, parse
from ..load import addresses_of_clients
from ..operations import Inventory, Operator, Page, wait_until
from .clients import POLITE, Clients, Manners
from .reckoning import Request, Strike

INVENTORY = Path(__file__).with_name("inventory")
CACHE = PROJECT / ".cache" / "faults"
FAULTY = Path(__file__).with_name("service") / "faulty.py"
CLOCK = Path(__file__).with_name("service") / "stepped_clock.c"
GATEWAY = "gw"
PROBE_SECONDS = 40


class Fleet:
    """One gateway and three GPU hosts with two cards each, rolled out and asked by clients."""

    def __init__(self, addresses: list[str]) -> None:
        """The fleet is up; `addresses` are those that clients may use."""
        description = describe(INVENTORY)
        self.fleet = description.fleet
        (self.service,) = self.fleet["services"].values()
        self.capacity: int = self.fleet["capacity"]
        self.slots = {one["id"]: one["slots"] for one in self.fleet["instances"]}
        self.addresses = addresses
        self.engine: Engine = this_machine()
        self.page = Page(self.fleet["gateways"][0]["url"])
        self.url = f"{self.page.url}{self.service['route']}audio-generate"
        inventory = Inventory(INVENTORY, CACHE / "a" / "inventory", "group_vars/all/faults.yml")
        self.operator = Operator(inventory)
        bed = hosts.read_inventory(INVENTORY)
        self.containers = {host.name: bed.container(host) for host in bed.hosts}
        self.begin()

    def begin(self) -> None:
        """Forget what the row before did."""
        self.strikes: list[Strike] = []
        self.clients_of_row: list[Clients] = []
        self.cause_gone = time.monotonic()
        self.note = ""
        self._before = set(self._lines())

    # What a row does

    def sh(self, host: str, command: str) -> str:
        """Run a command as root on a host, not by way of its network; return what it printed."""
        return self.engine.docker("exec", self.containers[host], "bash", "-c", command).strip()

    def instance(self, host: str, gpu: int) -> dict[str, Any]:
        """The instance of a card."""
        (found,) = [one for one in self.fleet["instances"] if (one["host"], one["gpu"]) == (host, gpu)]
        return dict(found)

    def instances(self, host: str) -> list[str]:
        """Ids of a host's instances."""
        return [one["id"] for one in self.fleet["instances"] if one["host"] == host]

    def clients(self, count: int, manners: Manners = POLITE, *, once: bool = False, first: int = 0) -> Clients:
        """So many clients, each at an address of its own as long as there are some."""
        addresses = [self.addresses[(first + number) % len(self.addresses)] for number in range(count)]
        clients = Clients(self.url, addresses, manners, once)
        self.clients_of_row.append(clients)
        return clients

    @contextmanager
    def load(self, count: int = 0, seconds_before: float = 2.0, seconds_after: float = 2.0) -> Iterator[None]:
        """Clients for all slots, or `count`, that ask before, during and after the block."""
        with self.clients(count or self.capacity):
            time.sleep(seconds_before)
            yield
            time.sleep(seconds_after)

    @contextmanager
    def strike(self, *instances: str) -> Iterator[None]:
        """The block hits processes that work, of these instances or, without any, of the gateway."""
        began = time.monotonic()
        yield
        self.strikes.append(Strike(began, time.monotonic(), frozenset(instances)))
        self.cause_gone = time.monotonic()

    def cause_is_gone(self) -> None:
        """From now on the fleet has to recover: the row has taken its fault away."""
        self.cause_gone = time.monotonic()

    @contextmanager
    def broken(self, host: str, break_it: str, mend: str, *, outside: bool = False) -> Iterator[None]:
        """Have something broken for the length of a block, by commands on a host or, `outside`, by docker's verbs."""

        def do(command: str) -> None:
            if outside:
                self.engine.docker(command, self.containers[host])
            else:
                self.sh(host, command)

        do(break_it)
        try:
            yield
        finally:
            do(mend)
            self.cause_is_gone()

    def wait_until_out(self, *instances: str, seconds: float = 10) -> None:
        """Return once the page says of all of these that they get no request."""
        wait_until(lambda: "ready" not in {self.states().get(name, "ready") for name in instances}, seconds)

    def sick(self, host: str, gpu: int, fault: str) -> AbstractContextManager[None]:
        """Have a card's app fail in a way for the length of a block."""
        file = f"{self.service['environment']['SIMULATED_FAULTS']}/{self.instance(host, gpu)['device']}"
        return self.broken(host, f"mkdir -p $(dirname {file}) && echo {fault} >{file}", f"rm -f {file}")

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

    def requests(self) -> list[Request]:
        """All that clients sent in this row."""
        return [request for clients in self.clients_of_row for request in clients.requests]

    def events(self) -> list[Event]:
        """All that ran on cards in this row for clients."""
        events = parse(line for line in self._lines() if line not in self._before and line.endswith("}"))
        return [event for event in events if event.request != SMOKE]

    def states(self) -> dict[str, str]:
        """State by instance; empty while the page cannot be read."""
        try:
            return self.page.states()
        except (httpx.HTTPError, ValueError):
            return {}

    def idle_and_ready(self) -> bool:
        """Whether the page says that all slots are there and free."""
        try:
            document = self.page.read()
        except (httpx.HTTPError, ValueError):
            return False
        totals = document.get("totals", {})
        return document["status"] == "healthy" and totals["in_flight"] == 0 and totals["ready"] == len(self.slots)

    def probe(self) -> int:
        """Ask for every slot at once; return how many answered."""
        clients = self.clients(self.capacity, once=True)
        with clients:
            pass
        return sum(request.status == 200 for request in clients.requests)

    def _lines(self) -> list[str]:
        ledger = self.service["environment"]["TTS_LEDGER"]
        with ThreadPoolExecutor() as pool:
            texts = pool.map(lambda host: self.sh(host, f"cat {ledger} 2>/dev/null || true"), self.fleet["hosts"])
            return [line for text in texts for line in text.splitlines()]


class Watch(Background):
    """Since when the page has said without a break that all instances are ready, for the length of a `with` block."""

    def __init__(self, fleet: Fleet) -> None:
        """Look at the fleet's page."""
        super().__init__()
        self.ready_since: float | None = None
        self._fleet = fleet

    def work(self) -> None:
        while not self.ending.wait(0.2):
            states = self._fleet.states()
            if not states or set(states.values()) != {"ready"}:
                self.ready_since = None
            elif self.ready_since is None:
                self.ready_since = time.monotonic()


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

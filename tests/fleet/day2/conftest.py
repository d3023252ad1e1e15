"""Fixtures for what an operator does every day: edit a copy of the inventory, run playbooks, pull a plug."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from testinfra.host import Host

from testbed import PROJECT, hosts
from testbed.engine import Engine, this_machine
from testbed.shell import run

from ..ledger import peaks, runs
from ..load import SteadyLoad

SMOKE = "smoke"  # the request id of the guards' own trial requests, which no client sent


class Inventory:
    """A copy of the scenario's inventory, as deep below the project as that one is: its relative paths hold."""

    def __init__(self, original: Path) -> None:
        self.original = original
        self.path = PROJECT / ".cache" / "day2" / "inventory"
        self.restore()

    def restore(self) -> None:
        """Make it equal to the scenario's own again."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.original, self.path, symlinks=True)

    @contextmanager
    def edited(self, file: str) -> Iterator[Any]:
        """Give a file's contents to be changed in place, and write them."""
        path = self.path / file
        contents = yaml.safe_load(path.read_text())
        yield contents
        path.write_text(yaml.safe_dump(contents, allow_unicode=True))

    @contextmanager
    def service(self) -> Iterator[dict[str, Any]]:
        """Give the only service to be changed."""
        with self.edited("group_vars/all/day2.yml") as variables:
            (service,) = variables["services"].values()
            yield service


class Operator:
    """Runs the playbooks, as ops do, against the copy of the inventory."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory

    def command(self, name: str, *options: str, **variables: Any) -> list[str]:
        """The command line of playbooks/NAME.yml, or of site.yml, with extra variables."""
        playbook = PROJECT / (f"{name}.yml" if name == "site" else f"playbooks/{name}.yml")
        settings = ["env", "--unset=ANSIBLE_FORCE_COLOR", f"ANSIBLE_CONFIG={PROJECT / 'ansible.cfg'}"]
        ansible = [sys.executable, "-m", "ansible", "playbook", "-i", os.fspath(self.inventory.path)]
        return [*settings, *ansible, "-e", json.dumps(variables), *options, os.fspath(playbook)]

    def play(self, name: str, *options: str, **variables: Any) -> str:
        """Run a playbook to its end and return what it printed; CommandFailed where it fails."""
        return run(*self.command(name, *options, **variables), seconds=600)

    def document(self, name: str, **variables: Any) -> dict[str, Any]:
        """Run a verb and return its document, and the exit code as `exit_code`."""
        done = subprocess.run(self.command(name, output="json", **variables), capture_output=True, timeout=600)
        return {**json.loads(done.stdout), "exit_code": done.returncode}


class Page:
    """The gateway's page, and the fleet's states on it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def read(self) -> dict[str, Any]:
        """The document as it is now."""
        document: dict[str, Any] = httpx.get(f"{self.url}/cluster/status", trust_env=False, timeout=10).json()
        return document

    def states(self) -> dict[str, str]:
        """State by instance."""
        return self.column("state")

    def column(self, name: str) -> dict[str, Any]:
        """One of its fields by instance; empty while the agent does not answer."""
        return {instance["id"]: instance[name] for instance in self.read().get("instances", [])}

    def wait_for(self, state: str, *instances: str, seconds: float = 5) -> None:
        """Return once the instances named, or all of the fleet, are in a state."""

        def reached() -> bool:
            states = self.states()
            return bool(states) and all(states.get(name) == state for name in instances or states)

        wait_until(reached, seconds, self.states)


def words(text: str) -> str:
    """What a playbook printed without its line breaks: long messages are folded."""
    return " ".join(text.split())


def wait_until(condition: Callable[[], bool], seconds: float, shown: Callable[[], object] = lambda: "") -> None:
    """Return once the condition holds; fail after `seconds`, with what `shown` returns."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"it did not come about in {seconds} s: {shown()}"
        time.sleep(0.1)


class Watch:
    """The least capacity that the page ever showed during a `with` block."""

    def __init__(self, page: Page) -> None:
        self.least = sys.maxsize
        self._page = page
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.2):
            self.least = min(self.least, self._page.read()["available_capacity"])


@pytest.fixture(scope="session")
def inventory(pytestconfig: pytest.Config) -> Inventory:
    return Inventory(PROJECT / pytestconfig.getoption("ansible_inventory"))


@pytest.fixture(scope="session")
def operator(inventory: Inventory) -> Operator:
    return Operator(inventory)


@pytest.fixture(autouse=True)
def original_inventory(inventory: Inventory) -> None:
    """Every test begins with the inventory that the scenario was rolled out with."""
    inventory.restore()


@pytest.fixture(scope="session")
def page(fleet: dict[str, Any]) -> Page:
    return Page(f"http://{fleet['gateways'][0]['address']}:{fleet['port']}")


@pytest.fixture(scope="session")
def engine() -> Engine:
    return this_machine()


@pytest.fixture(scope="session")
def container(inventory: Inventory) -> Callable[[str], str]:
    """`container("gpu03")` is the name of the container that is this host."""
    bed = hosts.read_inventory(inventory.original)
    return {host.name: bed.container(host) for host in bed.hosts}.__getitem__


@pytest.fixture
def reconciled(fleet: dict[str, Any], ledger: Callable[[], list[Any]]) -> Iterator[Callable[[SteadyLoad], None]]:
    """`reconciled(load)` has all that a load got compared with all that ran on the cards, once the test is over."""
    loads: list[SteadyLoad] = []
    yield loads.append
    events = ledger()
    ran = Counter({request: count for request, count in runs(events).items() if request != SMOKE})
    assert ran == Counter(answer.request for load in loads for answer in load.answers if answer.status == 200)
    slots = {instance["id"]: instance["slots"] for instance in fleet["instances"]}
    assert all(peak <= slots[instance] for instance, peak in peaks(events).items())


@pytest.fixture
def load(
    url: Callable[..., str], client_addresses: list[str], reconciled: Callable[[SteadyLoad], None]
) -> Iterator[SteadyLoad]:
    """Clients for a third of the slots, each of whose requests is served, and runs once."""
    with SteadyLoad(url("audio-generate"), client_addresses[:4], {"text": "一天"}) as running:
        reconciled(running)
        yield running
    assert running.answers and Counter(answer.status for answer in running.answers) == {200: len(running.answers)}


@pytest.fixture
def full_load(
    url: Callable[..., str],
    service: dict[str, Any],
    client_addresses: list[str],
    reconciled: Callable[[SteadyLoad], None],
) -> Iterator[SteadyLoad]:
    """A client for every slot; what finds none free is told so, and what is served runs once."""
    clients = client_addresses[: service["capacity"]]
    with SteadyLoad(url("audio-generate"), clients, {"text": "满载"}, pause=0.05) as running:
        reconciled(running)
        yield running
    assert running.answers and {answer.status for answer in running.answers} <= {200, 503}


@pytest.fixture
def pids(fleet: dict[str, Any], on: Callable[[str], Host]) -> Callable[..., dict[str, str]]:
    """`pids()` is the process id of every instance of the fleet that runs, and `pids("gpu01")` of one host's."""
    instances = {(one["host"], one["program"]): one["id"] for one in fleet["instances"]}

    def found(*names: str) -> dict[str, str]:
        def lines() -> dict[tuple[str, str], str]:
            chosen = names or fleet["hosts"]
            listed = ((host, on(host).run("supervisorctl status").stdout.splitlines()) for host in chosen)
            return {(host, line.split()[0]): line for host, found in listed for line in found}

        # Supervisor names no pid while a program is STARTING.
        wait_until(lambda: all("STARTING" not in line for line in lines().values()), 30, lines)
        running = {key: line.partition("pid ")[2].partition(",")[0] for key, line in lines().items() if "pid" in line}
        return {instances[key]: pid for key, pid in running.items()}

    return found


@pytest.fixture
def audit(fleet: dict[str, Any], on: Callable[[str], Host]) -> Callable[[], list[dict[str, Any]]]:
    """`audit()` is what the gateway's audit log has gained since the test began."""
    host = on(fleet["gateways"][0]["host"])

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in host.run("cat /var/lib/gpufleet-gateway/audit.log").stdout.splitlines()]

    before = len(lines())
    return lambda: lines()[before:]

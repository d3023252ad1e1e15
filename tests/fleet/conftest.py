"""Fixtures for asking a running fleet, the one of `--ansible-inventory`.

A test that takes `instance`, `gpu_host` or `gateway` runs once for each of them.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import testinfra
from testinfra.host import Host

from testbed import PROJECT, hosts
from testbed.engine import Engine, this_machine
from testbed.fleet import Description, describe

from .ledger import Event, parse
from .load import addresses_of_clients
from .operations import Inventory, Operator, wait_until

DESCRIPTION = pytest.StashKey[Description]()


def pytest_configure(config: pytest.Config) -> None:
    inventory = config.getoption("ansible_inventory")
    if not inventory:
        raise pytest.UsageError("tests/fleet asks a running fleet: name its inventory with --ansible-inventory")
    config.stash[DESCRIPTION] = describe(Path(inventory))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    fleet = metafunc.config.stash[DESCRIPTION].fleet
    for name, parameters, key in (
        ("instance", fleet["instances"], "id"),
        ("gpu_host", [{"name": name, **host} for name, host in fleet["hosts"].items()], "name"),
        ("gateway", fleet["gateways"], "host"),
    ):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, parameters, ids=[parameter[key] for parameter in parameters])


@pytest.fixture(scope="session")
def description(pytestconfig: pytest.Config) -> Description:
    return pytestconfig.stash[DESCRIPTION]


@pytest.fixture(scope="session")
def fleet(description: Description) -> dict[str, Any]:
    """The variable `fleet` of the plays."""
    return description.fleet


@pytest.fixture(scope="session")
def service(fleet: dict[str, Any]) -> dict[str, Any]:
    """The service whose engine takes a known time and keeps a ledger."""
    return next(given for given in fleet["services"].values() if given["environment"]["TTS_ENGINE"] == "simulated")


@pytest.fixture(scope="session")
def on(description: Description) -> Iterator[Callable[[str], Host]]:
    """`on("gpu01")` is that host over ssh, with the access that Ansible has."""
    # In /tmp for its short name: a socket's path has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="gpufleet-", dir="/tmp") as sockets:

        @functools.cache
        def host(name: str) -> Host:
            access = description.access[name]
            user = f"{access.user}@" if access.user else ""
            return testinfra.get_host(
                f"ssh://{user}{access.address or name}",
                ssh_identity_file=access.key or None,
                ssh_extra_args=access.options or None,
                controlpath=f"{sockets}/{name}",
            )

        yield host


@pytest.fixture
def inventory(pytestconfig: pytest.Config) -> Inventory:
    """A copy of the scenario's inventory, as it was rolled out with, to be edited."""
    original = PROJECT / pytestconfig.getoption("ansible_inventory")
    name = original.parent.name
    return Inventory(original, PROJECT / ".cache" / name / "inventory", f"group_vars/all/{name}.yml")


@pytest.fixture
def operator(inventory: Inventory) -> Operator:
    """Who runs the playbooks against that copy."""
    return Operator(inventory)


@pytest.fixture(scope="session")
def engine() -> Engine:
    return this_machine()


@pytest.fixture(scope="session")
def container(pytestconfig: pytest.Config) -> Callable[[str], str]:
    """`container("gpu03")` is the name of the container that is this host."""
    bed = hosts.read_inventory(PROJECT / pytestconfig.getoption("ansible_inventory"))
    return {host.name: bed.container(host) for host in bed.hosts}.__getitem__


def has_vip(gateway: Host, fleet: dict[str, Any]) -> bool:
    """Whether a gateway has the address of all."""
    return bool(gateway.check_output("ip address show to %s", fleet["vip"]["address"]))


@pytest.fixture
def active(fleet: dict[str, Any], on: Callable[[str], Host]) -> str:
    """The gateway that clients reach: the only one, or the one with the address of all."""
    names = [gateway["host"] for gateway in fleet["gateways"]]
    if fleet["vip"]:
        names = [name for name in names if has_vip(on(name), fleet)]
    (name,) = names
    return name


@pytest.fixture(scope="session")
def url(fleet: dict[str, Any]) -> Callable[..., str]:
    """`url("audio-generate")` is that path of the first service for clients; `url("", service=NAME)` of another."""

    def of(path: str, service: str = next(iter(fleet["services"]))) -> str:
        return f"{fleet['url']}{fleet['services'][service]['route']}{path}"

    return of


@pytest.fixture(scope="session")
def client_addresses(fleet: dict[str, Any]) -> Iterator[list[str]]:
    """Twenty addresses of this machine from which the gateway sees as many clients."""
    with addresses_of_clients(fleet["gateways"][0]["address"]) as addresses:
        yield addresses


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
def ledger(fleet: dict[str, Any], on: Callable[[str], Host]) -> Iterator[Callable[[], list[Event]]]:
    """`ledger()` is what ran on all cards since the test began. The last event of a request is there when it has been
    answered; after hang-ups wait for the work to end."""
    files = {service["environment"].get("TTS_LEDGER") for service in fleet["services"].values()} - {None}
    assert files, "no service of this inventory keeps a ledger"
    command = f"cat {' '.join(sorted(files))}"

    def read() -> list[str]:
        def lines(host: str) -> list[str]:
            return on(host).run(command).stdout.splitlines()

        with ThreadPoolExecutor() as pool:
            return [line for found in pool.map(lines, fleet["hosts"]) for line in found]

    before = set(read())
    return lambda: parse(line for line in read() if line not in before)

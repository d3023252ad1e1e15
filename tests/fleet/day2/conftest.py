"""Fixtures for what an operator does every day: edit a copy of the inventory, run playbooks, pull a plug."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from testinfra.host import Host

from ..background import Background
from ..ledger import SMOKE, peaks, runs
from ..load import SteadyLoad
from ..operations import Page


class Watch(Background):
    """The least capacity that the page ever showed during a `with` block."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.least = sys.maxsize
        self._page = page

    def work(self) -> None:
        while not self.ending.wait(0.2):
            self.least = min(self.least, self._page.read()["available_capacity"])


@pytest.fixture(scope="session")
def page(fleet: dict[str, Any]) -> Page:
    return Page(fleet["gateways"][0]["url"])


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
    """Clients for a quarter of the slots, each of whose requests is served, and runs once."""
    with SteadyLoad(url("audio-generate"), client_addresses[:3], {"text": "一天"}) as running:
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
def audit(fleet: dict[str, Any], on: Callable[[str], Host]) -> Callable[[], list[dict[str, Any]]]:
    """`audit()` is what the gateway's audit log has gained since the test began."""
    host = on(fleet["gateways"][0]["host"])

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in host.run("cat /var/lib/gpufleet-gateway/audit.log").stdout.splitlines()]

    before = len(lines())
    return lambda: lines()[before:]

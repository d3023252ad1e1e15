"""Two gateways with one address: the one that clients reach loses its power under load."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from testinfra.host import Host

from testbed.engine import Engine

from ..conftest import has_vip
from ..ledger import SMOKE, peaks, runs
from ..load import SteadyLoad, post_at_once
from ..operations import Inventory, Operator, Page, wait_until

FAILOVER_SECONDS = 3
PATIENCE = 5  # of a client: longer than any request, waiting included


@pytest.fixture(scope="module")
def pages(fleet: dict[str, Any]) -> dict[str, Page]:
    """The page of each gateway."""
    return {gateway["host"]: Page(gateway["url"]) for gateway in fleet["gateways"]}


@pytest.fixture
def member(fleet: dict[str, Any], service: dict[str, Any], operator: Operator, pages: dict[str, Page]) -> Iterator[str]:
    """An instance of the service; it serves again at the end."""
    name: str = next(one["id"] for one in fleet["instances"] if one["service"] == service["name"])
    yield name
    operator.play("undrain", target=name)
    for page in pages.values():
        page.wait_for("ready", seconds=20)


def test_the_source_of_a_gateways_connections_stays_its_own(
    fleet: dict[str, Any], active: str, on: Callable[[str], Host]
) -> None:
    """Guards and firewalls know it by that."""
    (address,) = (gateway["address"] for gateway in fleet["gateways"] if gateway["host"] == active)
    for host in fleet["hosts"].values():
        assert f" src {address} " in on(active).check_output("ip route get %s", host["address"])


def test_the_other_gateway_serves_within_three_seconds_and_admits_nothing_more(
    fleet: dict[str, Any],
    service: dict[str, Any],
    member: str,
    operator: Operator,
    url: Callable[..., str],
    client_addresses: list[str],
    ledger: Callable[[], list[Any]],
    active: str,
    on: Callable[[str], Host],
    pages: dict[str, Page],
    engine: Engine,
    container: Callable[[str], str],
) -> None:
    speak = url("audio-generate", service=service["name"])
    slots = {one["id"]: one["slots"] for one in fleet["instances"] if one["service"] == service["name"]}
    del slots[member]
    operator.play("drain", target=member)
    seats = sum(slots.values()) + len(slots) * service["queue"]
    with SteadyLoad(speak, client_addresses[:seats], {"text": "换"}, patience=PATIENCE) as load:
        time.sleep(3)
        killed = time.monotonic()
        engine.docker("kill", container(active))
        wait_until(lambda: Page(fleet["url"]).answers(seconds=0.2), 10)
        seconds = time.monotonic() - killed
        time.sleep(3)
    print(f"the address answered {seconds:.1f} s after {active} had died")
    assert seconds < FAILOVER_SECONDS
    answers = load.answers
    print(f"in {len(answers)} requests: {Counter(answer.status for answer in answers)}")
    assert {answer.status for answer in answers} <= {200, 503, None}
    assert [answer for answer in answers if answer.status == 200 and answer.began > killed]
    lost = [answer for answer in answers if answer.status is None]
    assert lost and all(answer.began < killed + FAILOVER_SECONDS for answer in lost)
    # What ran without an answer to anybody is what the dead gateway had in flight; nothing ran twice.
    ran = Counter({request: count for request, count in runs(ledger()).items() if request != SMOKE})
    served = Counter(answer.request for answer in answers if answer.status == 200)
    assert set(ran.values()) == {1}
    assert served <= ran
    assert 0 < (ran - served).total() <= seats
    assert peaks(ledger()) == slots
    # The drain was raised on both.
    burst = post_at_once(speak, client_addresses, {"text": "停"})
    assert Counter(answer.status for answer in burst) == {200: seats, 503: len(client_addresses) - seats}
    assert peaks(ledger()) == slots
    engine.docker("start", container(active))
    wait_until(pages[active].answers, 60)
    pages[active].wait_for("drained", member, seconds=20)
    pages[active].wait_for("ready", *slots, seconds=20)
    assert not has_vip(on(active), fleet)


def test_who_comes_back_takes_nothing_away(operator: Operator, active: str, pages: dict[str, Page]) -> None:
    found = operator.document("doctor")
    assert found["faults"] == []
    assert found["gateways"] == [{"host": host, "has_vip": host == active} for host in sorted(pages)]


def test_a_drain_is_raised_on_both_before_anybody_waits(
    operator: Operator,
    fleet: dict[str, Any],
    service: dict[str, Any],
    url: Callable[..., str],
    client_addresses: list[str],
    active: str,
    member: str,
) -> None:
    """Else the second one, which has the address now, would go on to fill every slot that gets free."""
    assert active != fleet["gateways"][0]["host"]
    with SteadyLoad(
        url("audio-generate", service=service["name"]), client_addresses, {"text": "换"}, patience=PATIENCE
    ):
        time.sleep(1)
        operator.play("drain", target=member, drain_timeout=20)


def test_a_gateway_leaves_and_comes_back(
    operator: Operator,
    inventory: Inventory,
    fleet: dict[str, Any],
    service: dict[str, Any],
    url: Callable[..., str],
    client_addresses: list[str],
    pids: Callable[..., dict[str, str]],
    active: str,
    member: str,
    on: Callable[[str], Host],
    pages: dict[str, Page],
) -> None:
    """Neither replaces a program; what is drained at the one that comes back is what was meanwhile, and no more."""
    before = pids()
    stale: str = next(one["id"] for one in fleet["instances"] if one["id"] != member)
    (other,) = set(pages) - {active}
    with SteadyLoad(
        url("audio-generate", service=service["name"]), client_addresses[:2], {"text": "换"}, patience=PATIENCE
    ) as load:
        operator.play("remove_host", target=active)
        wait_until(lambda: has_vip(on(other), fleet), 10)
        with inventory.edited("hosts.yml") as groups:
            del groups["gateways"]["hosts"][active]
        operator.play("site")
        assert not pages[active].answers(seconds=1)
        assert on(active).check_output("ls /var/lib/gpufleet-gateway/drain") == ""
        on(active).check_output("touch /var/lib/gpufleet-gateway/drain/%s", stale)  # as one has that died
        operator.play("drain", target=member)
        inventory.restore()
        operator.play("site")
        pages[active].wait_for("drained", member, seconds=20)
        pages[active].wait_for("ready", stale, seconds=20)
    assert pids() == before
    assert {200} <= {answer.status for answer in load.answers} <= {200, None}

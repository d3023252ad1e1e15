"""The promise: every slot is used and none is exceeded, counted on the GPU side, whatever happens in front of it."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

from ..ledger import peaks, runs
from ..load import Answer, post_at_once

MESSAGE = "Over the concurrency limit, please retry later / 超出并发限制,服务器过载,请稍后重试"
HANG_UP_SECONDS = 0.5


@pytest.fixture(scope="module")
def slots(fleet: dict[str, Any], service: dict[str, Any]) -> dict[str, int]:
    """Slots of the service's instances by id."""
    return {one["id"]: one["slots"] for one in fleet["instances"] if one["service"] == service["name"]}


@pytest.fixture(scope="module")
def seats(service: dict[str, Any]) -> int:
    """Requests of the service that are served out of as many at once: those at work, and those in its queues."""
    count: int = service["capacity"] + service["places"]
    return count


@pytest.fixture
def ask(url: Callable[..., str], service: dict[str, Any], client_addresses: list[str]) -> Callable[..., list[Answer]]:
    """`ask(20)` asks at once from as many clients; `ask(20, clients=1)` from one."""

    def post(count: int, clients: int = 20, **how: Any) -> list[Answer]:
        chosen = [client_addresses[number % clients] for number in range(count)]
        return post_at_once(url("audio-generate", service=service["name"]), chosen, {"text": "并发"}, **how)

    return post


def statuses(answers: list[Answer]) -> Counter[int | None]:
    return Counter(answer.status for answer in answers)


def ids_served(answers: list[Answer]) -> Counter[str]:
    return Counter(answer.request for answer in answers if answer.status == 200)


def test_a_burst_is_served_up_to_the_last_slot(
    ask: Callable[..., list[Answer]], seats: int, slots: dict[str, int], ledger: Callable[[], list[Any]]
) -> None:
    answers = ask(seats + 8)
    assert statuses(answers) == {200: seats, 503: 8}
    assert peaks(ledger()) == slots
    assert runs(ledger()) == ids_served(answers)


def test_the_refused_are_told_at_once_in_both_languages(ask: Callable[..., list[Answer]], seats: int) -> None:
    refused = [answer for answer in ask(seats + 8) if answer.status == 503]
    assert len(refused) == 8
    for answer in refused:
        assert answer.seconds < 1
        assert answer.headers["Retry-After"] == "1"
        assert answer.headers["Content-Type"] == "application/json"
        assert MESSAGE in answer.body.decode()


def test_a_single_client_gets_its_own_limit(
    ask: Callable[..., list[Answer]], service: dict[str, Any], ledger: Callable[[], list[Any]]
) -> None:
    answers = ask(20, clients=1)
    assert statuses(answers) == {200: service["client_limit"], 503: 20 - service["client_limit"]}
    assert runs(ledger()) == ids_served(answers)


def test_a_reload_under_load_admits_nothing_more(
    ask: Callable[..., list[Answer]],
    seats: int,
    slots: dict[str, int],
    ledger: Callable[[], list[Any]],
    active: str,
    fleet: dict[str, Any],
    on: Callable[[str], Host],
) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, seats)
        time.sleep(0.5)
        assert on(active).run(f"kill -HUP $(cat {fleet['nginx']['pid_file']})").rc == 0
        second = ask(seats)
        assert statuses(first.result()) == {200: seats}
    assert statuses(second) == {503: seats}
    assert peaks(ledger()) == slots


def test_clients_that_hang_up_free_no_card_that_still_works(
    ask: Callable[..., list[Answer]],
    service: dict[str, Any],
    seats: int,
    slots: dict[str, int],
    ledger: Callable[[], list[Any]],
) -> None:
    capacity, places = service["capacity"], service["places"]
    assert statuses(ask(seats, hang_up_after=HANG_UP_SECONDS)) == {None: seats}
    # Who waited has left the queues for others, who works holds a slot to the end.
    assert statuses(ask(seats)) == Counter({200: places, 503: capacity})
    time.sleep(float(service["environment"]["TTS_SIMULATED_SECONDS"]))
    assert statuses(ask(capacity)) == {200: capacity}
    assert peaks(ledger()) == slots
    assert sum(runs(ledger()).values()) == capacity + places + capacity
    assert set(runs(ledger()).values()) == {1}


def test_the_access_log_names_client_card_and_times(
    ask: Callable[..., list[Answer]],
    client_addresses: list[str],
    fleet: dict[str, Any],
    service: dict[str, Any],
    active: str,
    on: Callable[[str], Host],
) -> None:
    (answer,) = ask(1)
    log = f"{fleet['nginx']['log_directory']}/{service['name']}_access.log"
    line = on(active).run("grep -F %s %s", answer.request, log).stdout
    assert line.startswith(client_addresses[0])
    for part in (f"/{service['name']}-gpu", "upstream_status=200", "request_time=", "connections_active="):
        assert part in line


def test_a_rotated_log_is_written_on_under_its_name(
    ask: Callable[..., list[Answer]],
    fleet: dict[str, Any],
    service: dict[str, Any],
    active: str,
    on: Callable[[str], Host],
) -> None:
    """By the rules of the distribution, which name no file of ours; where nginx is not its own, by ours."""
    folder = fleet["nginx"]["log_directory"]
    host, log = on(active), f"{folder}/{service['name']}_access.log"
    (before,) = ask(1)
    assert host.run("logrotate --force /etc/logrotate.d/%s", Path(folder).name).rc == 0
    (after,) = ask(1)
    assert host.run("grep -F %s %s.1", before.request, log).rc == 0
    assert host.run("grep -F %s %s", after.request, log).rc == 0
    assert host.run("grep -F %s %s", before.request, log).rc == 1

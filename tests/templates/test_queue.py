"""Requests that wait: the rendered gateway before real guards, whose ledgers tell what ran where and when."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fleet.ledger import parse, peaks, runs
from tests.templates.conftest import ALICE, CAROL, KEYS, Cluster, article_fleet
from tests.templates.test_gateway import BUSY, statuses
from tests.unit.service_helpers import serving

SECONDS = 1.5


class Guarded(Cluster):
    """A gateway before real guards."""

    def __init__(self, gateway, fleet, guards, ledger):
        super().__init__(gateway, fleet)
        self.guards, self.ledger = guards, ledger
        ledger.write_text("")

    def events(self):
        """What ran so far."""
        return parse(self.ledger.read_text().splitlines())

    async def count(self, name):
        """Sum of a number over the status of all guards."""
        loop = asyncio.get_running_loop()
        told = await asyncio.gather(*(loop.run_in_executor(None, guard.status) for guard in self.guards.values()))
        return sum(status[name] for status in told)

    async def until(self, **numbers):
        """Wait until the guards' numbers are these, less than anyone works."""
        begun = time.monotonic()
        while (seen := {name: await self.count(name) for name in numbers}) != numbers:
            assert time.monotonic() - begun < SECONDS, seen
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def guards(folder, fleet, seconds=SECONDS):
    """Run the guard of every instance of a fleet, by id."""
    service = fleet["services"]["cosyvoice2"]
    with contextlib.ExitStack() as stack:
        started = {}
        for instance in fleet["instances"]:
            own = folder / instance["id"]
            own.mkdir(parents=True)
            environment = {
                "WORK_SECONDS": str(seconds),
                "WORK_LEDGER": str(folder / "ledger"),
                "SLOT_GUARD_INSTANCE": instance["id"],
                "SLOT_GUARD_SLOTS": str(instance["slots"]),
                "SLOT_GUARD_QUEUE": str(service["queue"]),
                "SLOT_GUARD_QUEUE_SECONDS": str(service["queue_timeout_seconds"]),
            }
            bind = f"{instance['address']}:{instance['port']}"
            started[instance["id"]] = stack.enter_context(serving(own, "plain:app", "--bind", bind, **environment))
        yield started


FLEET = {"gpu_count": 1, "queue": 2, "queue_timeout_seconds": 30}
"""Three instances with 2 slots and 2 places each: 6 at work, 6 waiting."""


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """Guards that no test of this module changes: (guards, ledger)."""
    folder = tmp_path_factory.mktemp("guards")
    with guards(folder, article_fleet(**FLEET)) as started:
        yield started, folder / "ledger"


@pytest.fixture
def trio(gateway, standing):
    """A function that runs `scenario(cluster)` before the standing guards."""

    def run(scenario, **service):
        fleet = article_fleet(**FLEET, **service)
        gateway.write(fleet, gateway_worker_processes="4")
        gateway.start()
        try:
            asyncio.run(scenario(Guarded(gateway, fleet, *standing)))
        finally:
            gateway.stop()

    return run


def test_nginx_accepts_the_configuration(gateway):
    gateway.write(article_fleet(hosts=100, queue=4, route="/"))
    checked = gateway.command("-t")
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr


def test_a_burst_of_twice_the_capacity_is_served(trio):
    async def scenario(cluster):
        assert statuses(await cluster.burst(12)) == {200: 12}
        assert set(peaks(cluster.events()).values()) == {2}
        assert set(runs(cluster.events()).values()) == {1}
        assert Counter(event.instance for event in cluster.events() if event.event == "start") == dict.fromkeys(
            cluster.guards, 4
        )

    trio(scenario)


def test_beyond_the_queue_the_refusal_comes_at_once(trio):
    async def scenario(cluster):
        first = asyncio.create_task(cluster.burst(12))
        await cluster.until(in_flight=6, waiting=6)
        answers = await cluster.burst(4)
        assert statuses(answers) == {503: 4}
        assert await cluster.count("waiting") == 6, "nobody was kept waiting for his refusal"
        assert answers[0].headers["retry-after"] == "1"
        assert answers[0].json()["error"]["message"] == BUSY
        assert statuses(await first) == {200: 12}
        assert max(peaks(cluster.events()).values()) == 2

    trio(scenario)


def test_a_client_that_leaves_the_queue_frees_its_place_at_once_and_never_runs(trio):
    async def scenario(cluster):
        working = asyncio.create_task(cluster.burst(6))
        await cluster.until(in_flight=6)
        leaving = asyncio.create_task(cluster.burst(6, timeout=0.5))
        await cluster.until(waiting=6)
        assert await leaving == [None] * 6
        await cluster.until(in_flight=6, waiting=0)
        assert statuses(await cluster.burst(6)) == {200: 6}
        assert statuses(await working) == {200: 6}
        assert sum(runs(cluster.events()).values()) == 12
        assert max(peaks(cluster.events()).values()) == 2

    trio(scenario)


def test_a_client_that_waited_and_leaves_in_mid_work_frees_nothing(trio):
    """Not the slot, and not its own share: else short time-outs and retries would take the whole fleet."""

    async def scenario(cluster):
        working = asyncio.create_task(cluster.burst(6, clients=2))
        await cluster.until(in_flight=6)
        his = {"client": "127.0.0.80", "timeout": 1.5 * SECONDS}
        leaving = asyncio.gather(*(cluster.post(**his) for _ in range(4)))
        await cluster.until(waiting=4)
        assert statuses(await working) == {200: 6}
        assert await leaving == [None] * 4
        assert await cluster.count("in_flight") == 4
        his = {"client": "127.0.0.80"}
        refused = await asyncio.gather(*(cluster.post(**his) for _ in range(4)))
        assert statuses(refused) == {200: 2, 503: 2}, "his four still work; the length of a queue is his leeway"
        others = [cluster.post(client=f"127.0.0.{90 + n}") for n in range(8)]
        assert statuses(await asyncio.gather(*others)) == {200: 8}
        assert max(peaks(cluster.events()).values()) == 2

    trio(scenario, client_limit=4)


def test_a_keys_limit_counts_who_waits_and_the_work_of_who_has_left(trio):
    """From whatever address its holders ask."""

    async def ask(cluster, key, count, **request):
        headers = {"Authorization": f"Bearer {key}"}
        posts = [cluster.post(client=f"127.0.0.{10 + number}", headers=headers, **request) for number in range(count)]
        return await asyncio.gather(*posts)

    async def scenario(cluster):
        working = asyncio.create_task(ask(cluster, CAROL, 6))
        await cluster.until(in_flight=6)
        leaving = asyncio.create_task(ask(cluster, ALICE, 6, timeout=1.5 * SECONDS))
        await cluster.until(waiting=4)
        assert statuses(await working) == {200: 6}
        assert statuses(await leaving) == {503: 2}, "four waited, and left while they were worked for"
        assert await cluster.count("in_flight") == 4
        refused = await ask(cluster, ALICE, 4)
        assert statuses(refused) == {200: 2, 503: 2}, "the four still work; the length of a queue is the leeway"
        assert max(peaks(cluster.events()).values()) == 2

    trio(scenario, client_limit=12, entrance={"api_keys": KEYS})


def test_a_reload_admits_nothing_more_and_loses_nobody(trio):
    async def scenario(cluster):
        first = asyncio.create_task(cluster.burst(12))
        await cluster.until(in_flight=6, waiting=6)
        cluster.gateway.reload()
        await asyncio.sleep(0.3)
        assert statuses(await cluster.burst(6, clients=6)) == {503: 6}
        assert statuses(await first) == {200: 12}
        assert set(peaks(cluster.events()).values()) == {2}

    trio(scenario)


def test_a_free_slot_goes_before_any_queue(trio):
    """One GPU is at work for somebody whom nginx knows nothing of, as after a stream that was cut."""

    async def scenario(cluster):
        busy = next(iter(cluster.guards.values()))
        unknown = [busy.begin("/") for _ in range(2)]
        await cluster.until(in_flight=2)
        asked = asyncio.create_task(cluster.burst(4))
        await cluster.until(in_flight=6, waiting=0)
        assert statuses(await asked) == {200: 4}
        assert all(client.recv(12) == b"HTTP/1.1 200" for client in unknown)

    trio(scenario)


@pytest.fixture
def pair(gateway, tmp_path):
    """A function that runs `scenario(cluster)` before two GPUs of its own with a slot each."""

    def run(scenario, seconds=SECONDS, **service):
        fleet = article_fleet(hosts=2, gpu_count=1, slots=1, base_port=22321, client_limit=2, **service)
        gateway.write(fleet)
        with guards(tmp_path, fleet, seconds) as started:
            gateway.start()
            try:
                asyncio.run(scenario(Guarded(gateway, fleet, started, tmp_path / "ledger")))
            finally:
                gateway.stop()

    return run


def test_who_waits_in_vain_is_told_in_time_and_was_never_started(pair):
    async def scenario(cluster):
        working = asyncio.create_task(cluster.burst(2))
        await cluster.until(in_flight=2)
        begun = time.monotonic()
        answers = await cluster.burst(2)
        assert 0.9 < time.monotonic() - begun < 3
        assert [(answer.status_code, answer.json()["error"]["message"]) for answer in answers] == [(503, BUSY)] * 2
        assert statuses(await working) == {200: 2}
        assert sum(runs(cluster.events()).values()) == 2

    pair(scenario, seconds=5, queue=1, queue_timeout_seconds=1)


@pytest.mark.parametrize("how", ["stopped", "drained", "killed"])
def test_who_waits_for_a_gpu_that_is_taken_away_waits_for_another(pair, how):
    async def scenario(cluster):
        working = asyncio.create_task(cluster.burst(2, clients=2))
        await cluster.until(in_flight=2)
        waiting = asyncio.create_task(cluster.burst(2, clients=2))
        await cluster.until(waiting=2)
        name, gone = next(iter(cluster.guards.items()))
        if how == "drained":
            cluster.gateway.drain(name)
            assert json.loads(gone.ask("POST", "/_slot_guard/send_away")[2]) == {"sent_away": 1}
        elif how == "stopped":
            gone.process.terminate()
        else:
            killed = (gone.process.pid, worker(gone))
            for process in killed:
                os.kill(process, signal.SIGKILL)
        assert statuses(await waiting) == {200: 2}
        assert statuses(await working) == ({200: 1, 502: 1} if how == "killed" else {200: 2})
        ran = [event.instance for event in cluster.events() if event.event == "start"]
        assert Counter(ran)[name] == 1
        assert set(runs(cluster.events()).values()) == {1}

    pair(scenario, queue=2, queue_timeout_seconds=30)


def test_a_guard_that_cannot_answer_costs_no_more_than_the_promised_wait(pair):
    """An app that holds its event loop answers no question for a slot either."""

    async def scenario(cluster):
        for guard in cluster.guards.values():
            os.kill(worker(guard), signal.SIGSTOP)
        begun = time.monotonic()
        first = asyncio.create_task(cluster.burst(2))  # nginx lets them in, nobody works on them
        await asyncio.sleep(0.3)
        assert statuses(await cluster.burst(2)) == {503: 2}
        assert time.monotonic() - begun < 4
        for guard in cluster.guards.values():
            os.kill(worker(guard), signal.SIGCONT)
        assert statuses(await first) == {200: 2}

    pair(scenario, queue=1, queue_timeout_seconds=1)


def worker(guard):
    """Process id of a Gunicorn's only worker."""
    return int(Path(f"/proc/{guard.process.pid}/task/{guard.process.pid}/children").read_text())

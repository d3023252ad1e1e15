"""The real agent beside the real nginx on loopback: who gets requests, and what the cluster says of itself."""

import asyncio
import os
import signal
import time

from tests.templates.conftest import article_fleet, running
from tests.templates.test_gateway import statuses

WITHIN = 2.0
"""Seconds within which a change of an instance must show in who gets requests."""


async def until(condition, seconds=WITHIN):
    """Wait until ``condition()`` holds; return the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def test_an_instance_that_loads_gets_no_request_until_it_is_ready(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            loading = cluster.gpus["cosyvoice2-gpu02-1"]
            loading.state = "loading"
            await gateway.start_agent()
            assert gateway.flagged == {"cosyvoice2-gpu02-1"}, "flagged before the agent is heard"
            assert statuses(await cluster.burst(12)) == {200: 10, 503: 2}
            assert loading.started == 0
            loading.state = "ready"
            await until(lambda: not gateway.flagged)
            assert statuses(await cluster.burst(12)) == {200: 12}
            assert loading.started == 2
            loading.state = "suspect"
            await until(lambda: gateway.flagged == {"cosyvoice2-gpu02-1"})
            assert statuses(await cluster.burst(12)) == {200: 10, 503: 2}

    asyncio.run(scenario())


def test_a_dead_instance_is_out_and_comes_back_by_itself(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            await gateway.start_agent()
            await cluster.gpus["cosyvoice2-gpu01-0"].stop()
            await until(lambda: gateway.flagged == {"cosyvoice2-gpu01-0"})
            health = await cluster.ask("/health")
            assert (health.status_code, health.text) == (200, "degraded: 5 of 6 instances ready, 10 of 12 slots\n")
            await cluster.gpus["cosyvoice2-gpu01-0"].start()
            await until(lambda: not gateway.flagged)
            health = await cluster.ask("/health")
            assert (health.status_code, health.text) == (200, "healthy\n")

    asyncio.run(scenario())


def test_the_status_tells_every_instance_and_the_totals(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            cluster.gpus["cosyvoice2-gpu03-0"].state = "loading"
            gateway.drain("cosyvoice2-gpu02-0")
            for gpu in cluster.gpus.values():
                gpu.seconds = 3
            await gateway.start_agent()
            busy = asyncio.create_task(cluster.burst(8))
            await until(lambda: cluster.started == 8)
            gateway.drain("cosyvoice2-gpu01-0")
            await asyncio.sleep(1.2)  # a whole pass later
            answer = await cluster.ask("/cluster/status")
            seen = answer.json()
            assert (answer.status_code, answer.headers.get_list("content-type")) == (200, ["application/json"])
            assert {name: seen[name] for name in list(seen)[:8] if name != "timestamp"} == {
                "status": "degraded",
                "cluster": "gpufleet",
                "total_capacity": 12,
                "available_capacity": 6,
                "servers": 3,
                "gpus_per_server": 2,
                "concurrent_per_gpu": 2,
            }
            assert [(entry["id"], entry["state"], entry["in_flight"]) for entry in seen["instances"]] == [
                ("cosyvoice2-gpu01-0", "draining", 2),
                ("cosyvoice2-gpu01-1", "ready", 2),
                ("cosyvoice2-gpu02-0", "drained", 0),
                ("cosyvoice2-gpu02-1", "ready", 2),
                ("cosyvoice2-gpu03-0", "loading", 0),
                ("cosyvoice2-gpu03-1", "ready", 2),
            ]
            assert seen["totals"]["in_flight"] == 8
            assert seen["services"]["cosyvoice2"] == seen["totals"]
            assert statuses(await busy) == {200: 8}

    asyncio.run(scenario())


def test_a_cluster_without_a_ready_instance_says_503(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            for gpu in cluster.gpus.values():
                gpu.state = "loading"
            await gateway.start_agent()
            health, status = await cluster.ask("/health"), await cluster.ask("/cluster/status")
            assert (health.status_code, health.text) == (503, "down: 0 of 6 instances ready, 0 of 12 slots\n")
            assert (status.status_code, status.json()["status"]) == (503, "down")
            assert status.json()["available_capacity"] == 0
            assert statuses(await cluster.burst(6)) == {503: 6}
            assert cluster.started == 0

    asyncio.run(scenario())


def test_a_dead_agent_changes_nothing_for_requests(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            cluster.gpus["cosyvoice2-gpu02-1"].state = "loading"
            await gateway.start_agent()
            gateway.kill_agent()
            assert gateway.flagged == {"cosyvoice2-gpu02-1"}
            assert statuses(await cluster.burst(12)) == {200: 10, 503: 2}
            await told_as_unknown(cluster)

    asyncio.run(scenario())


def test_a_hung_agent_changes_nothing_for_requests(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            await gateway.start_agent()
            os.kill(gateway.agent.pid, signal.SIGSTOP)
            assert statuses(await cluster.burst(12)) == {200: 12}
            await told_as_unknown(cluster)
            os.kill(gateway.agent.pid, signal.SIGCONT)
            assert (await cluster.ask("/health")).text == "healthy\n"
            assert gateway.flagged == set()

    asyncio.run(scenario())


async def told_as_unknown(cluster):
    health, status = await asyncio.gather(cluster.ask("/health"), cluster.ask("/cluster/status"))
    assert (health.status_code, health.text) == (200, "healthy, agent not answering\n")
    assert (status.status_code, status.json()["error"]["code"]) == (503, "agent_not_answering")

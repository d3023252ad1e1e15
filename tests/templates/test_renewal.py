"""A killed nginx worker takes no slot with it: the real nginx and the program that renews its counts."""

import asyncio
import time

import httpx

from tests.templates.conftest import article_fleet, running
from tests.templates.test_gateway import statuses


async def served(cluster, count):
    """Send requests of which some will be cut; return how many were served."""

    async def post(client):
        try:
            return (await cluster.post(client=client)).status_code == 200
        except httpx.TransportError:
            return False

    return sum(await asyncio.gather(*(post(f"127.0.0.{10 + number}") for number in range(count))))


async def all_slots_killed(gateway, cluster):
    """Kill all workers while every slot is in use; wait until the GPUs are free."""
    for gpu in cluster.gpus.values():
        gpu.seconds = 1
    requests = asyncio.create_task(served(cluster, 12))
    while cluster.running < 12:
        await asyncio.sleep(0.01)
    gateway.kill_workers()
    assert await requests == 0
    while cluster.running:
        await asyncio.sleep(0.01)
    for gpu in cluster.gpus.values():
        gpu.seconds = 0.3


async def seconds_until_whole(cluster):
    """Ask for all slots at once until all are served."""
    began = time.monotonic()
    while statuses(await cluster.burst(12)) != {200: 12}:
        assert time.monotonic() - began < 5, "the slots do not come back"
        await asyncio.sleep(0.1)
    return time.monotonic() - began


def test_without_it_the_slots_of_a_killed_worker_are_lost(gateway):
    """Else the others would test nothing."""

    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            await all_slots_killed(gateway, cluster)
            gateway.reload()
            await asyncio.sleep(0.5)
            assert statuses(await cluster.burst(12)) == {503: 12}

    asyncio.run(scenario())


def test_the_slots_of_killed_workers_come_back_each_time(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            with gateway.renewed():
                for _ in range(3):
                    await all_slots_killed(gateway, cluster)
                    await seconds_until_whole(cluster)

    asyncio.run(scenario())


def test_a_reload_keeps_the_counts_of_renewed_zones(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            with gateway.renewed():
                await all_slots_killed(gateway, cluster)
                await seconds_until_whole(cluster)
                for gpu in cluster.gpus.values():
                    gpu.seconds = 1.5
                first = asyncio.create_task(cluster.burst(12))
                await asyncio.sleep(0.3)
                gateway.reload()
                await asyncio.sleep(0.4)
                assert statuses(await cluster.burst(12)) == {503: 12}
                assert statuses(await first) == {200: 12}
                assert cluster.peak == 2

    asyncio.run(scenario())


def test_a_death_that_nobody_watched_is_made_good_later(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            await all_slots_killed(gateway, cluster)
            with gateway.renewed():
                await seconds_until_whole(cluster)
            zone = gateway.folder / "run/gpufleet-gateway/zones/instance.conf"
            renewed = zone.read_text()
            with gateway.renewed():
                await asyncio.sleep(1)
            assert zone.read_text() == renewed

    asyncio.run(scenario())

"""The rivals of the benchmark: their nginx configurations load, and do what they are measured for."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from bench.gateway.clients import Crowd, as_told
from bench.gateway.contenders import CONTENDERS, Contender, Gateway
from bench.gateway.fleet import Templates
from bench.gateway.software import Software
from tests.templates.conftest import article_fleet
from tests.templates.gpu import SimulatedGpu

NGINX = [contender for contender in CONTENDERS if contender.program == "nginx"]


@pytest.mark.parametrize("contender", NGINX, ids=lambda contender: contender.name)
def test_twice_as_many_as_slots_are_half_served(folder: Path, nginx_program: str, contender: Contender) -> None:
    fleet = article_fleet()
    gateway = Gateway(contender, fleet, folder, Software())

    async def scenario() -> None:
        gpus = [SimulatedGpu(instance["address"], instance["port"]) for instance in fleet["instances"]]
        for gpu in gpus:
            gpu.seconds = 1
            await gpu.start()
        crowd = Crowd(gateway.port, as_told, patience=0)
        await crowd.arrive([0.0] * 24, [1.0] * 24)
        assert Counter(answer.status for answer in crowd.answers) == {200: 12, 503: 12}
        assert [gpu.peak for gpu in gpus] == [2] * 6
        for gpu in gpus:
            await gpu.stop()

    with Templates() as templates:
        gateway.write(templates)
    assert gateway.check() > 0
    gateway.start()
    try:
        gateway.reload()
        asyncio.run(scenario())
    finally:
        gateway.stop()

"""What is measured. Each scenario takes the contenders in turn, in every round in another order."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gateway import ideal
from bench.gateway.clients import BEHAVIOURS, REFUSALS, Answer, Crowd, Probe, as_told
from bench.gateway.contenders import CONTENDERS, GPUFLEET, Gateway, free_port
from bench.gateway.fleet import ROUTE, Templates, fleet
from bench.gateway.gpus import Gpus
from bench.gateway.software import Software
from bench.machine import cpu_seconds, memory_mib
from bench.stats import Event, busy_seconds, jain, most_running, percentile

INSTANCES = 6
WORK = (0.4, 0.6)
"""Seconds that an inference takes in the scenarios of load: scaled down, so that slots change hands often."""
TOLD = Answer(503, 0, 0, retry_after=1)
"""A refusal that takes no time, with the Retry-After that gpufleet gives."""
OVERLOAD = 1.5
"""Users that come, as a share of those that can be served."""

KEPT, NEW, GUARDED = "GPUs, kept connections", "GPUs, new connections", "guarded GPUs, new connections"
"""Asked without a gateway, all GPUs in turn: how one-tier nginx asks them, and on the way to how gpufleet does."""

Figures = dict[str, Any]
"""By contender by measure the rounds' values."""


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    rounds: int = 3
    requests: int = 1500
    streams: int = 300
    refusal_seconds: float = 2.5
    ramp_seconds: float = 5
    """An overload is measured from when it is one: when the first users who were refused have given up."""
    overload_seconds: float = 5
    fairness_seconds: float = 6
    bursts: int = 5
    throughput_seconds: int = 3
    sizes: tuple[int, ...] = (6, 600, 4000)
    size_requests: int = 300


QUICK = Extent(1, 60, 20, 0.5, 0.5, 1, 1, 1, 1, (6,), 30)


class Arena:
    """All contenders before their GPUs, up for the length of a `with` block."""

    def __init__(self, software: Software, templates: Templates, folder: Path) -> None:
        """Prepare below `folder`."""
        self.software, self.templates, self.folder = software, templates, folder
        self.base_port = free_port()
        bare = self._fleet(0, {})
        self.bare = Gpus(templates, bare, folder / "gpus", guarded=False)
        self.gateways: list[Gateway] = []
        self._gpus: dict[str, Gpus] = {}
        for number, contender in enumerate(CONTENDERS):
            own = {**bare, "port": free_port()} if contender.rival else self._fleet(number, contender.service)
            self.gateways.append(Gateway(contender, own, folder / f"gateway{number}", software))
            self._gpus[contender.name] = (
                self.bare if contender.rival else Gpus(templates, own, folder / f"gpus{number}", guarded=True)
            )

    def __enter__(self) -> Arena:
        """Start everything."""
        try:
            for gpus in {id(gpus): gpus for gpus in [self.bare, *self._gpus.values()]}.values():
                gpus.start()
            for gpus in [self.bare, *self._gpus.values()]:
                gpus.wait()
            for gateway in self.gateways:
                gateway.write(self.templates)
                gateway.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop everything."""
        for gateway in self.gateways:
            gateway.stop()
        for gpus in {id(gpus): gpus for gpus in [self.bare, *self._gpus.values()]}.values():
            gpus.stop()

    def gpus(self, gateway: Gateway) -> Gpus:
        """The GPUs behind a gateway."""
        return self._gpus[gateway.contender.name]

    def turns(self, rounds: int) -> Iterator[tuple[int, Gateway]]:
        """Every gateway once in every round, each time another one first."""
        for number in range(rounds):
            shift = number % len(self.gateways)
            for gateway in self.gateways[shift:] + self.gateways[:shift]:
                yield number, gateway

    def _fleet(self, subnet: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        return fleet(INSTANCES, free_port(), subnet, base_port=self.base_port, **fields)


def _figures() -> Figures:
    return {contender.name: {} for contender in CONTENDERS}


def _note(figures: Figures, name: str, **values: Any) -> None:
    for measure, value in values.items():
        figures.setdefault(name, {}).setdefault(measure, []).append(value)


def _percentiles(seen: Figures, rounds: int) -> Figures:
    """The 50th and 99th percentile of each measure in each of `rounds` parts of its course."""
    figures: Figures = {}
    for name, measures in seen.items():
        for measure, values in measures.items():
            part = len(values) // rounds
            for start in range(0, part * rounds, part):
                for percent in (50, 99):
                    value = percentile(values[start : start + part], percent)
                    _note(figures, name, **{f"{measure}_p{percent}": value})
    return figures


def latency(arena: Arena, extent: Extent) -> Figures:
    """Seconds of one request, alone: whole, and to the first byte of a stream; through everyone and direct.

    Every turn asks all of them, in an order of its own: who comes after another one meets what that left to be done.
    `direct, again` is asked like the others; what it differs from `direct` by is noise.
    """
    rng = random.Random(1)
    bare, guarded = (
        [(instance["address"], instance["port"]) for instance in gpus.instances]
        for gpus in (arena.bare, arena._gpus[GPUFLEET.name])
    )
    probes = [
        ("direct", Probe(bare[0])),
        ("direct, again", Probe(bare[0])),
        (KEPT, Probe(*bare)),
        (NEW, Probe(*bare, keep=False)),
        (GUARDED, Probe(*guarded, keep=False)),
        *((gateway.contender.name, Probe(("127.0.0.1", gateway.port))) for gateway in arena.gateways),
    ]
    seen: Figures = {name: {} for name, _ in probes}
    for measure, path, number in (
        ("whole", "generate", extent.requests),
        ("first_byte", "generate?pieces=2&seconds=0.004", extent.streams),
    ):
        for turn in range(number + 10):
            for name, probe in rng.sample(probes, len(probes)):
                seconds = getattr(probe, measure)(path)
                if turn >= 10:  # the first ones warm up
                    _note(seen, name, **{measure: seconds})
    for _, probe in probes:
        probe.close()
    return _percentiles(seen, extent.rounds)


def refusal(arena: Arena, extent: Extent) -> Figures:
    """Seconds of a refusal while all slots, and the queue where there is one, are held by long work."""
    figures = _figures()
    for _ in range(extent.rounds):
        seen = asyncio.run(_while_held(arena, extent.refusal_seconds))
        for name, seconds in seen.items():
            _note(figures, name, refusal_p50=percentile(seconds, 50), refusal_p99=percentile(seconds, 99))
    return figures


async def _while_held(arena: Arena, seconds: float) -> dict[str, list[float]]:
    """The seconds of refusals by every gateway."""
    async with asyncio.TaskGroup() as holders:
        for gateway in arena.gateways:
            crowd = Crowd(gateway.port, as_told, patience=0)
            for _ in range(arena.gpus(gateway).slots + gateway.contender.queue):
                holders.create_task(crowd.ask(seconds + 1))
        await asyncio.sleep(0.5)
        return await asyncio.to_thread(_refusals, arena, time.monotonic() + seconds)


def _refusals(arena: Arena, end: float) -> dict[str, list[float]]:
    probes = [(gateway.contender.name, Probe(("127.0.0.1", gateway.port))) for gateway in arena.gateways]
    seen: dict[str, list[float]] = {name: [] for name, _ in probes}
    rng = random.Random(1)
    while time.monotonic() < end:
        for name, probe in rng.sample(probes, len(probes)):
            seen[name].append(probe.refusal("generate"))
    return seen


def overload(arena: Arena, extent: Extent) -> Figures:
    """More users than can be served, who come at random: how much of the slots is used, and what refusals take."""
    slots = arena.bare.slots
    rate = OVERLOAD * slots / (sum(WORK) / 2)
    users = round(rate * (extent.ramp_seconds + extent.overload_seconds))

    def come(number: int) -> tuple[list[float], list[float]]:
        rng = random.Random(number)
        return [rng.expovariate(rate) for _ in range(users)], [rng.uniform(*WORK) for _ in range(users)]

    def slot_use(events: list[Event], first: float, gaps: list[float]) -> float:
        begin, end = first + extent.ramp_seconds, first + sum(gaps)
        return busy_seconds(events, begin, end) / (slots * (end - begin))

    figures: Figures = {}
    for behaviour, pause in BEHAVIOURS.items():
        figures[behaviour] = _figures()
        for number, gateway in arena.turns(extent.rounds):
            gaps, work = come(number)
            gpus, crowd = arena.gpus(gateway), Crowd(gateway.port, pause)
            mark, first = gpus.mark(), time.monotonic()
            asyncio.run(crowd.arrive(gaps, work, close=True))
            events = gpus.events(mark)
            refused = [answer.seconds for answer in crowd.answers if answer.status in REFUSALS]
            _note(
                figures[behaviour],
                gateway.contender.name,
                slot_use=slot_use(events, first, gaps),
                most_running=most_running(events),
                refusal_p50=percentile(refused, 50),
                refusal_p99=percentile(refused, 99),
                refused_per_served=len(refused) / sum(answer.status == 200 for answer in crowd.answers),
                broken=sum(answer.status not in (200, *REFUSALS) for answer in crowd.answers),
            )
        for number in range(extent.rounds):
            gaps, work = come(number)
            course = ideal.overload(gaps, work, pause(TOLD), Crowd.patience, slots)
            _note(
                figures[behaviour],
                ideal.IDEAL,
                slot_use=slot_use(course.events, 0, gaps),
                refused_per_served=course.refused / course.served,
            )
    return figures


def fairness(arena: Arena, extent: Extent) -> Figures:
    """Twice as many clients as slots, each of whom always wants one more: what each of them gets."""
    figures = _figures()
    for number, gateway in arena.turns(extent.rounds):
        crowd = Crowd(gateway.port, as_told, patience=float("inf"))
        clients = 2 * arena.gpus(gateway).slots
        served = asyncio.run(crowd.compete(clients, extent.fairness_seconds, random.Random(number)))
        _note(figures, gateway.contender.name, jain=jain(served), least=min(served), most=max(served))
    return figures


def burst(arena: Arena, extent: Extent) -> Figures:
    """Twice as many requests as slots, all at once: how many are served at once, and what all wait for with retries."""
    figures = _figures()
    for number, gateway in arena.turns(extent.bursts):
        gpus = arena.gpus(gateway)
        rng = random.Random(number)
        work = [rng.uniform(*WORK) for _ in range(2 * gpus.slots)]
        for patience in (0.0, 15.0):
            mark, began = gpus.mark(), time.monotonic()
            crowd = Crowd(gateway.port, as_told, patience=patience)
            asyncio.run(crowd.arrive([0.0] * len(work), work))
            seconds, events = time.monotonic() - began, gpus.events(mark)
            seen: dict[str, float] = {"most_running": most_running(events)}
            if patience:
                seen["seconds_until_all_served"] = seconds
                seen |= {f"wait_p{percent}": percentile(crowd.waits, percent) for percent in (50, 95)}
                seen["idle"] = 1 - busy_seconds(events, began, began + seconds) / (gpus.slots * seconds)
            else:
                seen["served_at_once"] = len(crowd.waits) / len(work)
            _note(figures, gateway.contender.name, **seen)
    return figures


def throughput(arena: Arena, extent: Extent) -> Figures:
    """Tiny requests over six kept connections: requests a second, and the gateway's processor time for each."""
    figures = _figures()
    for _, gateway in arena.turns(extent.rounds):
        _note(figures, gateway.contender.name, **_wrk(arena.software, gateway, extent.throughput_seconds))
    return figures


def _wrk(software: Software, gateway: Gateway, seconds: int) -> dict[str, float]:
    url = f"http://127.0.0.1:{gateway.port}{ROUTE}generate"
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write('wrk.method = "POST"\nwrk.body = "{}"\n')
        script.flush()
        before = cpu_seconds(gateway.pids)
        done = subprocess.run(
            [software["wrk"], "-t1", "-c6", f"-d{seconds}s", "-s", script.name, url],
            capture_output=True,
            text=True,
            env=software.environment,
            check=True,
        )
        used = cpu_seconds(gateway.pids) - before
    number, per_second, failed = read_wrk(done.stdout)
    return {"per_second": per_second, "cpu_microseconds": used / number * 1e6, "failed": failed}


def read_wrk(said: str) -> tuple[int, float, int]:
    """Requests, requests a second and failed requests of what wrk printed."""
    number = re.search(r"(\d+) requests in", said)
    per_second = re.search(r"Requests/sec: +([\d.]+)", said)
    if not number or not per_second:
        raise RuntimeError(f"wrk said\n{said}")
    other = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    broken = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", said)
    failed = (int(other[1]) if other else 0) + (sum(map(int, broken.groups())) if broken else 0)
    return int(number[1]), float(per_second[1]), failed


def size(arena: Arena, extent: Extent) -> Figures:
    """What a fleet of so many instances costs the gateway. They share the few GPUs that run here."""
    figures: Figures = {}
    for instances in extent.sizes:
        figures[str(instances)] = _figures()
        for contender in CONTENDERS:
            wide = fleet(instances, free_port(), base_port=arena.base_port, **contender.service)
            real = arena.bare if contender.rival else arena._gpus[contender.name]
            for number, instance in enumerate(wide["instances"]):
                there = real.instances[number % len(real.instances)]
                instance.update(address=there["address"], port=there["port"])
            folder = arena.folder / f"{instances}-{CONTENDERS.index(contender)}"
            with _serving(Gateway(contender, wide, folder, arena.software), arena) as gateway:
                for _ in range(extent.rounds):
                    _note(figures[str(instances)], contender.name, check=gateway.check(), reload=gateway.reload())
                probe = Probe(("127.0.0.1", gateway.port))
                whole = [probe.whole("generate") for _ in range(extent.size_requests)]
                probe.close()
                _note(
                    figures[str(instances)],
                    contender.name,
                    **({"render": gateway.render_seconds} if gateway.render_seconds is not None else {}),
                    whole=percentile(whole, 50),
                    memory_mib=memory_mib(gateway.pids),
                    configuration_bytes=gateway.configuration_bytes,
                    **_wrk(arena.software, gateway, extent.throughput_seconds),
                )
    return figures


@contextmanager
def _serving(gateway: Gateway, arena: Arena) -> Iterator[Gateway]:
    gateway.write(arena.templates)
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.stop()


SCENARIOS = {
    "latency": latency,
    "refusal": refusal,
    "overload": overload,
    "burst": burst,
    "fairness": fairness,
    "throughput": throughput,
    "size": size,
}

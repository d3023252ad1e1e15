"""The benchmarks' arithmetic, and the clients that they send."""

import asyncio
import random
import statistics
import time

import pytest

from bench.gateway import ideal
from bench.gateway.clients import Answer, Crowd, Probe, as_told, naive
from bench.gateway.contenders import CONTENDERS, GPUFLEET
from bench.gateway.report import document, goals
from bench.gateway.scenarios import GUARDED, KEPT, NEW, read_wrk
from bench.report import Unit, table
from bench.stats import Event, Sample, busy_seconds, jain, most_running, percentile


def test_percentiles_are_those_of_the_standard_library() -> None:
    rng = random.Random(1)
    values = [rng.expovariate(1) for _ in range(1001)]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (1, 50, 90, 99):
        assert percentile(values, percent) == pytest.approx(cuts[percent - 1])
    assert (percentile([7.0], 99), percentile([1.0, 3.0], 50)) == (7, 2)


def test_a_sample_is_its_median_and_its_extremes() -> None:
    sample = Sample((3.0, 1.0, 2.0, 9.0))
    assert (sample.low, sample.median, sample.high) == (1, 2.5, 9)


def test_jains_index() -> None:
    assert jain([5, 5, 5, 5]) == 1
    assert jain([20, 0, 0, 0]) == 0.25
    assert jain([0, 0]) == 1


def test_busy_seconds_are_the_area_under_what_runs() -> None:
    events = [
        Event(0.0, "a", 1),
        Event(1.0, "a", 2),
        Event(3.0, "a", 1),
        Event(6.0, "a", 0),
        Event(4.0, "b", 1),  # still runs at the end
    ]
    assert busy_seconds(events, 0, 10) == 1 * 1 + 2 * 2 + 3 * 1 + 6 * 1
    assert busy_seconds(events, 2, 5) == 1 * 2 + 2 * 1 + 1 * 1
    assert busy_seconds(random.Random(1).sample(events, 5), 2, 5) == 5
    assert busy_seconds([], 0, 10) == 0
    assert (most_running(events), most_running([])) == (2, 0)


def test_the_ideal_gateway_serves_whoever_finds_a_slot_and_no_one_else() -> None:
    # The first is served from 1 to 3; the second, refused at 2 and 2.5, is served at 3; the third, refused at 2.25,
    # 2.75 and 3.25, has lost patience by 3.75; the last one finds the slot free.
    course = ideal.overload([1, 1, 0.25, 3.75], [2, 1, 9, 1], pause=0.5, patience=1.25, slots=1)
    assert [(event.time, event.running) for event in course.events] == [(1, 1), (3, 0), (3, 1), (4, 0), (6, 1), (7, 0)]
    assert (course.served, course.refused) == (3, 5)


def test_the_ideal_gateway_lets_nobody_come_again_after_the_last_one() -> None:
    course = ideal.overload([1, 1, 0], [2, 1, 1], pause=1, patience=9, slots=1)
    assert (course.served, course.refused) == (1, 2)


def test_what_wrk_says_is_read() -> None:
    said = "  6 threads and 10 connections\n  1000 requests in 2.00s, 1MB read\n{}Requests/sec:    499.50\n"
    assert read_wrk(said.format("")) == (1000, 499.5, 0)
    failed = "  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 50\n"
    assert read_wrk(said.format(failed)) == (1000, 499.5, 60)
    with pytest.raises(RuntimeError, match="unable to connect"):
        read_wrk("unable to connect")


def test_figures_are_shown_with_their_noise() -> None:
    assert Unit("ms", 1e3, 1).show([0.002, 0.001, 0.004]) == "2.0 (1.0 to 4.0)"
    assert Unit("").show([2, 2, 2]) == "2"
    assert table(["", "x"], [["a", "1"]]) == "|  | x |\n| --- | ---: |\n| a | 1 |"


def results(**changes: float) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Results with all goals met but for `changes` in gpufleet's."""
    seen = {
        "slot_use": 0.99,
        "most_running": 2,
        "whole_p50": 0.00125,
        "first_byte_p50": 0.003,
        "refusal_p99": 0.004,
    }
    ours = {measure: [value] * 3 for measure, value in {**seen, **changes}.items()}
    rivals = {measure: [value] for measure, value in {**seen, "whole_p50": 0.0012, "slot_use": 0.98}.items()}
    direct = {"whole_p50": [0.001], "first_byte_p50": [0.001]}
    parts = {
        name: {**direct, "whole_p50": [p50]} for name, p50 in ((KEPT, 0.00102), (NEW, 0.00109), (GUARDED, 0.00121))
    }
    figures = {contender.name: rivals for contender in CONTENDERS} | {GPUFLEET.name: ours}
    loaded = {**figures, ideal.IDEAL: {"slot_use": [0.99]}}
    same = dict.fromkeys(("refusal", "burst"), figures)
    return {
        "latency": {"direct": direct, **parts, **figures},
        "overload": {"as told": loaded, "naive": loaded},
        **same,
    }


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"slot_use": 0.9799}, ["98 % or more", "no rival has more, beyond noise"] * 2),
        (
            {"slot_use": 0.97},
            ["98 % or more", "no rival has more, beyond noise", "of what there is without a queue"] * 2,
        ),
        ({"most_running": 3}, ["never more than 2"]),
        ({"refusal_p99": 0.0051}, ["refusal p99"]),
        ({"whole_p50": 0.00127}, ["1.3 times"]),
        ({"whole_p50": 0.0021}, ["below 1 ms", "1.3 times"]),
        ({"first_byte_p50": 0.0031}, ["first byte"]),
    ],
)
def test_a_goal_that_is_missed_is_told(changes: dict[str, float], missed: list[str]) -> None:
    told = [goal.text for goal in goals(results(**changes)) if not goal.met]
    assert len(told) == len(missed)
    assert all(part in text for part, text in zip(missed, told))


MACHINE = {
    "date": "2026-01-02T03:04+00:00",
    "cpu": "A CPU",
    "cores": 2,
    "memory_gib": 24,
    "kernel": "6.1",
    "load_before": 0.1,
    "minutes": 9.5,
    "versions": {"nginx": "1.22.1"},
}


def test_the_document_names_date_machine_and_all_contenders() -> None:
    text = document(MACHINE, results(most_running=3), ["gateway-load.svg"])
    for part in ("2026-01-02", "2 cores of A CPU", "Linux 6.1", "nginx 1.22.1", "| **no** |", "](gateway-load.svg)"):
        assert part in text
    assert all(f"| {contender.name} |" in text for contender in CONTENDERS)


def test_the_document_tells_where_the_time_goes() -> None:
    text = document(MACHINE, results(), [])
    assert "Where the 0.05 ms go that gpufleet takes longer than one-tier nginx: 0.07 ms are a connection" in text
    assert "0.12 ms are the slot guard; and 0.04 ms are two tiers" in text
    assert "where one that does not takes 0.18 ms" in text


class Refuser:
    """A gateway that refuses the first requests, then answers."""

    def __init__(self, refusals: int, head: str = "Retry-After: 0\r\n") -> None:
        self.refusals, self.head = refusals, head
        self.asked = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"{}")
        self.asked += 1
        status = "503 Busy" if self.asked <= self.refusals else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\n{self.head}Content-Length: 2\r\n\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"{}")
        if b"keep-alive" in request:
            await reader.read()  # until the client has closed
        writer.close()

    async def __aenter__(self) -> int:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        await asyncio.sleep(0.05)  # for connections that the client has closed just now


def test_a_client_comes_again_until_it_is_served_or_out_of_patience() -> None:
    async def scenario() -> None:
        async with Refuser(2) as port:
            crowd = Crowd(port, as_told)
            assert await crowd.ask(0.1)
            assert [answer.status for answer in crowd.answers] == [503, 503, 200]
            assert [answer.retry_after for answer in crowd.answers] == [0, 0, 0]
        async with Refuser(99) as port:
            crowd = Crowd(port, lambda _: 0.1, patience=0.5)
            assert not await crowd.ask(0.1)
            assert 2 <= len(crowd.answers) <= 4

    asyncio.run(scenario())


def test_a_broken_connection_is_no_answer() -> None:
    async def scenario() -> None:
        crowd = Crowd(9, as_told)  # nobody listens there
        assert not await crowd.ask(0.1)
        assert [answer.status for answer in crowd.answers] == [0]

    asyncio.run(scenario())


def test_how_long_clients_wait() -> None:
    told, untold = Answer(503, 0, 0, retry_after=7), Answer(503, 0, 0)
    assert (as_told(told), as_told(untold), naive(told)) == (7, 1, 0.2)


def test_the_probe_times_the_first_byte_of_the_body_and_not_its_head() -> None:
    async def scenario() -> None:
        async with Refuser(0) as port:
            probe = Probe(("127.0.0.1", port))
            assert await asyncio.to_thread(probe.first_byte, "x") >= 0.05
            probe.close()
        async with Refuser(1) as port:
            probe = Probe(("127.0.0.1", port))
            began = time.perf_counter()
            seconds = await asyncio.to_thread(probe.refusal, "x")
            assert 0.05 <= seconds <= time.perf_counter() - began
            with pytest.raises(RuntimeError, match="status 200"):
                await asyncio.to_thread(probe.refusal, "x")
            probe.close()

    asyncio.run(scenario())


def test_a_probe_asks_all_places_in_turn_over_new_connections() -> None:
    async def scenario() -> None:
        first, second = Refuser(0, "Connection: close\r\n"), Refuser(0, "Connection: close\r\n")
        async with first as one, second as other:
            probe = Probe(("127.0.0.1", one), ("127.0.0.1", other), keep=False)
            for asked in ((1, 0), (1, 1), (2, 1)):
                await asyncio.to_thread(probe.whole, "x")
                assert (first.asked, second.asked) == asked

    asyncio.run(scenario())

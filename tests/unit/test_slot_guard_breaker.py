"""When the guard takes its instance out, what the next process makes of that, and the smoke request."""

import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slot_guard import Settings, SlotGuard, guard
from slot_guard.breaker import Breaker, Trip
from slot_guard.smoke import Smoke
from slot_guard.trip_file import TripFile

from tests.unit.test_slot_guard import GATEWAY, Puppet, Request, answer_ok, running, settle


@given(st.integers(1, 5), st.lists(st.sampled_from(["good", "bad", "bad", "restart"]), max_size=60))
def test_the_breaker_trips_at_the_limit_in_a_row_or_at_once_on_probation(limit, events):
    breaker, last, seen = Breaker(limit), None, []
    for now, event in enumerate(events):
        if event == "restart":
            breaker, seen = Breaker(limit, last), []
            continue
        seen.append(event)
        before_this = seen[:-1]
        tripped = "trip" in before_this
        if event == "good":
            assert breaker.succeed() is (last is not None and not tripped)
            last = last if tripped else None
            continue
        in_a_row = next((n for n, earlier in enumerate(reversed(seen)) if earlier != "bad"), len(seen))
        expected = not tripped and in_a_row >= (1 if last else limit)
        assert breaker.fail() is expected
        if expected:
            count = last.count + 1 if last else 1
            last = breaker.trip("as told", now)
            assert last == breaker.last_trip == Trip("as told", count, now)
            seen.append("trip")


def test_pauses_double_up_to_five_minutes():
    pauses = [Trip("", count, 0).pause_seconds for count in (1, 2, 3, 4, 5, 6, 7, 8, 10**400)]
    assert pauses == [5, 10, 20, 40, 80, 160, 300, 300, 300]


@given(st.integers(1, 20), st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_no_step_of_the_clock_makes_a_pause_longer(count, at, now):
    trip = Trip("", count, at)
    assert 0 <= trip.seconds_left(now) <= trip.pause_seconds
    assert trip.seconds_left(at) == pytest.approx(trip.pause_seconds, abs=0.001)


def test_a_trip_outlives_its_process_but_not_its_release(tmp_path):
    trip = Trip("显存不足", 3, 1e9)
    TripFile(tmp_path, "a-gpu01-0", "v1").save(trip)
    assert TripFile(tmp_path, "a-gpu01-0", "v1").load() == trip
    assert TripFile(tmp_path, "a-gpu01-0", "v2").load() is None
    assert TripFile(tmp_path, "a-gpu01-1", "v1").load() is None
    TripFile(tmp_path, "a-gpu01-0", "v1").clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"7",
        b"[]",
        b"{}",
        b"[" * 100_000,
        *(
            json.dumps({"reason": "r", "count": 1, "at": 1.0, "version": "", **wrong}).encode()
            for wrong in ({"count": 0}, {"count": "x"}, {"at": None}, {"at": float("nan")}, {"count": float("inf")})
        ),
    ],
    ids=lambda content: content[:60].decode(errors="replace"),
)
def test_a_broken_file_is_ignored_with_a_word(tmp_path, caplog, content):
    (tmp_path / "slot_guard.trip.json").write_bytes(content)
    assert TripFile(tmp_path, "", "").load() is None
    assert "slot_guard.trip.json is ignored" in caplog.text


def test_a_directory_that_cannot_be_used_is_said_and_harmless(tmp_path, caplog):
    (tmp_path / "file").touch()
    file = TripFile(tmp_path / "file", "", "")
    assert file.load() is None
    file.save(Trip("", 1, 0))
    file.clear()
    assert len(caplog.messages) == 3
    nowhere = TripFile(None, "", "")
    nowhere.save(Trip("", 1, 0))
    nowhere.clear()
    assert nowhere.load() is None


async def echo(scope, receive, send):
    """Answer with what was asked."""
    assert (await receive())["body"] == scope["path"].encode()[1:]
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    assert headers["content-length"] == str(len(scope["path"].encode()) - 1)
    assert (headers["x-request-id"], headers["x-extra"]) == ("smoke", "1")
    assert (scope["method"], scope["query_string"], scope["state"]) == ("POST", b"q=1", {"model": "loaded"})
    await answer_ok(send)
    assert await receive() == {"type": "http.disconnect"}


def test_a_smoke_request_is_a_whole_one():
    smoke = Smoke.from_json(
        json.dumps({"method": "POST", "path": "/%E5%A5%BD?q=1", "headers": {"X-Extra": "1"}, "body": "好"})
    )
    assert asyncio.run(smoke.ask(echo, {"model": "loaded"})) is None


def answering(*messages, then=None):
    async def app(scope, receive, send):
        for message in messages:
            await send(message)
        if then:
            await then()

    return app


async def explode():
    raise RuntimeError("CUDA out of memory")


async def hang():
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if asyncio.get_running_loop().time() > hang.until:
                raise


async def cancel():
    raise asyncio.CancelledError


START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b""}


@pytest.mark.parametrize(
    ("app", "fault"),
    [
        (answering(START, END), None),
        (answering({**START, "status": 500}, END), "status 500 and not 200"),
        (answering({**START, "status": 204}, END), "status 204 and not 200"),
        (answering(), "status None and not 200"),
        (answering(START), "an unfinished answer"),
        (answering(START, {**END, "more_body": True}), "an unfinished answer"),
        (answering(START, END, then=explode), "RuntimeError('CUDA out of memory')"),
        (answering(START, END, then=cancel), "it cancelled itself"),
        (answering(START, then=hang), "no answer within 0.05 s"),
    ],
)
def test_what_a_smoke_request_finds(app, fault):
    async def play():
        hang.until = asyncio.get_running_loop().time() + 0.1
        found = await Smoke("/", time_limit_seconds=0.05).ask(app)
        await asyncio.sleep(0.1)
        return found

    assert asyncio.run(play()) == fault


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SMOKE", "{", "SLOT_GUARD_SMOKE is '{'"),
        ("SMOKE", "[]", "path that begins with /"),
        ("SMOKE", '{"path": "x"}', "path that begins with /"),
        ("SMOKE", '{"path": "/x", "boddy": ""}', "no field boddy; known are body, headers, method"),
        ("SMOKE", '{"path": "/x", "body": {}}', "must be text"),
        ("SMOKE", '{"path": "/x", "headers": {"a": 1}}', "must be text"),
        ("SMOKE", '{"path": "/x", "status": "200"}', "must be numbers above 0"),
        ("FAILURES", "0", "SLOT_GUARD_FAILURES is '0'"),
        ("TIME_LIMIT", "0", "SLOT_GUARD_TIME_LIMIT is '0'"),
    ],
)
def test_settings_are_refused_by_name(variable, value, said):
    with pytest.raises(ValueError, match=said):
        Settings.from_environment({"SLOT_GUARD_APP": "a:b", f"SLOT_GUARD_{variable}": value})


def test_the_state_directory_is_home_unless_told(tmp_path):
    told = {"SLOT_GUARD_APP": "a:b", "HOME": "/home/a"}
    assert str(Settings.from_environment(told).state_directory) == "/home/a"
    assert str(Settings.from_environment({**told, "SLOT_GUARD_STATE": "/b"}).state_directory) == "/b"


class Moody:
    """An app that answers each request with the next of the test's statuses."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            raise NotImplementedError
        status = self.statuses.pop(0)
        if status == "raise":
            raise RuntimeError("as told")
        await send({**START, "status": status})
        await send(END)


@pytest.fixture(autouse=True)
def short_farewell(monkeypatch):
    monkeypatch.setattr(guard, "FAREWELL_SECONDS", 0.05)


@asynccontextmanager
async def process(tmp_path, app, wait=True, **settings):
    """One process of an instance; `guard.exits` holds what its exits found."""
    exits = []
    instance = SlotGuard(
        Settings("x:y", state_directory=tmp_path, **settings), lambda: app, on_failure=lambda: exits.append(1)
    )
    instance.exits = exits
    async with running(instance):
        while wait and instance.state not in {"ready", "failed"} and not exits:
            await asyncio.sleep(0.001)
        yield instance


async def outcomes(instance, number):
    """Send requests one after the other: their statuses, or what the app raised."""
    seen = []
    for _ in range(number):
        request = Request(instance)
        await asyncio.wait([request.server])
        error = request.server.exception()
        seen.append(str(error) if error else request.sent[0]["status"])
    return seen


def test_three_failures_in_a_row_end_the_process(tmp_path):
    async def play():
        async with process(tmp_path, Moody(500, 503, "raise", 200), instance="i") as instance:
            assert await outcomes(instance, 3) == [500, 503, "as told"]
            for headers in ((), GATEWAY):
                status, sent, error = await Request(instance, headers=headers).answer()
                assert (status, sent[b"x-slot-guard"], error["error"]["code"]) == (429, b"suspect", "suspect")
            status, _, brief = await Request(instance, "/_slot_guard/ready").answer()
            assert (status, brief["state"]) == (503, "suspect")
            assert brief["reason"] == "3 failed in a row, the last / with RuntimeError('as told')"
            told = instance.status()
            assert (told["consecutive_failures"], told["trips"], told["refused"]) == (3, 1, 2)
            metrics = (await Request(instance, "/_slot_guard/metrics").answer())[2]
            for sample in ("suspect{", "trips{"):
                assert f'slot_guard_{sample}instance="i",version=""}} 1\n' in metrics
            assert 'slot_guard_consecutive_failures{instance="i",version=""} 3\n' in metrics
            assert instance.exits == []
            await asyncio.sleep(0.1)
            assert instance.exits == [1]

    asyncio.run(play())


@pytest.mark.parametrize(
    "statuses",
    [
        [500, 500, 200] * 4,
        [500, 200, "raise", 302] * 4,
        [404, 422, 499, 429] * 3,
    ],
)
def test_poison_between_good_requests_and_clients_mistakes_do_not(tmp_path, statuses):
    async def play():
        async with process(tmp_path, Moody(*statuses)) as instance:
            await outcomes(instance, len(statuses))
            assert instance.state == "ready"
            assert instance.status()["reason"] is None

    asyncio.run(play())
    assert list(tmp_path.iterdir()) == []


def announcing(length, *pieces, status=200):
    """An app whose answers have the length and the pieces that are given, whatever they sum up to."""

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            raise NotImplementedError
        await send({**START, "status": status, "headers": [(b"Content-Length", str(length).encode())]})
        for piece in pieces:
            await send({**END, "body": piece, "more_body": True})
        await send(END)

    return app


@pytest.mark.parametrize(
    ("app", "method", "state"),
    [
        (announcing(5, b"abc"), "GET", "suspect"),
        (announcing(5), "GET", "suspect"),
        (announcing(5, b"abc", b"de"), "GET", "ready"),
        (announcing(5), "HEAD", "ready"),
        (announcing(5, status=304), "GET", "ready"),
    ],
    ids=["short", "empty", "whole", "no body asked for", "no body allowed"],
)
def test_an_answer_shorter_than_announced_is_a_failure(tmp_path, app, method, state):
    async def play():
        async with process(tmp_path, app) as instance:
            for _ in range(3):
                await asyncio.wait([Request(instance, method=method).server])
            assert instance.state == state
            assert instance.status()["failed"] == (3 if state == "suspect" else 0)
            if state == "suspect":
                assert instance.status()["reason"] == "3 failed in a row, the last / with half an answer"

    asyncio.run(play())


def test_a_clients_mistake_proves_nothing(tmp_path):
    async def play():
        async with process(tmp_path, Moody(500, 404, 500, 404, 500)) as instance:
            await outcomes(instance, 5)
            assert instance.state == "suspect"

    asyncio.run(play())


def test_clients_that_hang_up_are_no_failures(tmp_path):
    async def play():
        puppet = Puppet()
        async with process(tmp_path, puppet, slots=1) as instance:
            for order in ("raise", "return", "raise", "raise", "raise"):
                request = Request(instance)
                await settle()
                await request.hang_up()
                puppet.calls[-1][0].put_nowait(order)
                await settle()
            assert (instance.state, instance.status()["consecutive_failures"]) == ("ready", 0)

    asyncio.run(play())


@pytest.mark.parametrize("cancelled", [True, False])
def test_what_an_app_answers_to_a_client_that_left_is_no_failure(tmp_path, cancelled):
    """Frameworks answer 500 when reading the body of such a request raises."""

    async def play():
        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                raise NotImplementedError
            while (await receive())["type"] != "http.disconnect":
                pass
            await answering({**START, "status": 500}, END)(scope, receive, send)

        async with process(tmp_path, app, failure_limit=1) as instance:
            request = Request(instance)
            await settle()
            if cancelled:
                await request.hang_up()
                await settle()
            else:
                await request.disconnect()
            assert (instance.state, instance.requests["failed"]) == ("ready", 1)

    asyncio.run(play())


def test_an_instance_that_was_taken_out_lets_its_work_finish(tmp_path):
    async def play():
        puppet = Puppet()
        async with process(tmp_path, puppet, failure_limit=1) as instance:
            long, short = Request(instance), Request(instance)
            await settle()
            puppet.calls[1][0].put_nowait("raise")
            await asyncio.wait([short.server])
            await asyncio.sleep(0.1)
            assert (instance.state, instance.exits, short.server.exception() is None) == ("suspect", [], False)
            puppet.calls[0][0].put_nowait("return")
            await asyncio.wait([long.server])
            assert (long.sent[0]["status"], instance.exits, instance.state) == (200, [], "suspect")
            await asyncio.sleep(0.1)
            assert instance.exits == [1]

    asyncio.run(play())


def test_work_that_hangs_keeps_no_instance_that_was_taken_out(tmp_path, caplog, capfd):
    hung = threading.Event()

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            raise NotImplementedError
        if scope["path"] == "/hangs":
            await asyncio.to_thread(hung.wait)
        await answering({**START, "status": 500}, END)(scope, receive, send)

    async def play():
        async with process(tmp_path, app, failure_limit=1, time_limit_seconds=0.1) as instance:
            Request(instance, "/hangs")
            await settle()
            await outcomes(instance, 1)
            assert (instance.state, instance.exits) == ("suspect", [])
            await asyncio.sleep(0.5)
            assert instance.exits == [1]
            hung.set()

    asyncio.run(play())
    assert "x:y hangs: 1 of 2 slots still at work after 0.1 s, it ends without them" in caplog.text
    assert "in wait" in capfd.readouterr().err, "where the threads are"


def test_a_request_that_waits_for_a_slot_does_not_get_in_after_the_trip(tmp_path):
    async def play():
        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                raise NotImplementedError
            await send({**START, "status": 500})
            await send(END)
            await asyncio.sleep(0)

        async with process(tmp_path, app, slots=1, failure_limit=1) as instance:
            first = Request(instance)
            while len(first.sent) < 2:
                await asyncio.sleep(0)
            assert (await Request(instance).answer())[1][b"x-slot-guard"] == b"suspect"
            await first.server

    asyncio.run(play())


def left_behind(tmp_path, count=1, ago=1000.0):
    TripFile(tmp_path, "", "").save(Trip("as told", count, time.time() - ago))


def test_after_a_trip_the_pause_comes_first_and_a_good_smoke_forgets_it(tmp_path):
    async def play():
        left_behind(tmp_path, ago=4.7)
        async with process(tmp_path, Moody(200, 500), wait=False, smoke=Smoke("/")) as instance:
            begun = time.monotonic()
            await settle()
            assert (instance.state, instance.status()["reason"]) == ("suspect", "as told")
            assert (await Request(instance).answer())[0] == 429
            while instance.state != "ready":
                await asyncio.sleep(0.001)
            assert 0.1 < time.monotonic() - begun < 1
            assert list(tmp_path.iterdir()) == []
            assert instance.requests == {"served": 0, "failed": 0, "refused": 1}
            await outcomes(instance, 1)
            assert (instance.state, instance.status()["trips"]) == ("ready", 0)

    asyncio.run(play())


def test_a_bad_smoke_keeps_the_instance_out_for_longer(tmp_path):
    async def play():
        left_behind(tmp_path, count=2)
        async with process(tmp_path, Moody(500), smoke=Smoke("/")) as instance:
            assert (instance.state, instance.exits, instance.status()["trips"]) == ("suspect", [1], 3)
            assert instance.status()["reason"] == "smoke request GET /: status 500 and not 200"

    asyncio.run(play())
    assert TripFile(tmp_path, "", "").load().pause_seconds == 20


def test_without_a_smoke_request_the_instance_comes_back_on_probation(tmp_path):
    async def play(*statuses):
        async with process(tmp_path, Moody(*statuses)) as instance:
            assert (instance.state, instance.status()["trips"]) == ("ready", 1)
            await outcomes(instance, len(statuses))
            return instance.state, instance.status()["trips"]

    left_behind(tmp_path)
    assert asyncio.run(play(404, 500)) == ("suspect", 2)
    left_behind(tmp_path)
    assert asyncio.run(play(200, 500, 500)) == ("ready", 0)


def test_work_that_a_smoke_request_leaves_behind_ends_before_the_first_client(tmp_path):
    async def play():
        ended = []

        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                raise NotImplementedError
            asyncio.get_running_loop().run_in_executor(None, lambda: (time.sleep(0.1), ended.append(1)))
            await answer_ok(send)

        async with process(tmp_path, app, smoke=Smoke("/")):
            assert ended == [1]

    asyncio.run(play())


def test_the_app_may_shut_down_before_its_process_is_ended(tmp_path):
    seen = []

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            seen.append((await receive())["type"])
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await answering({**START, "status": 500}, END)(scope, receive, send)

    async def play():
        async with process(tmp_path, app, smoke=Smoke("/")) as instance:
            assert (seen, instance.exits) == (["lifespan.shutdown"], [1])

    asyncio.run(play())


def test_a_stop_is_not_kept_waiting_by_a_pause_or_a_farewell(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "FAREWELL_SECONDS", 60)

    async def play():
        async with process(tmp_path, Moody(500), failure_limit=1) as instance:
            await outcomes(instance, 1)
        assert (instance.state, instance.exits) == ("stopping", [])
        async with process(tmp_path, Moody(), wait=False) as instance:
            await settle()
            assert instance.state == "suspect"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    begun = time.monotonic()
    asyncio.run(play())
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("headers", "added"),
    [
        ([], True),
        ([(b"content-type", b"audio/wav")], True),
        ([(b"Content-Length", b"0")], False),
        ([(b"X-Accel-Buffering", b"yes")], False),
    ],
)
def test_streams_ask_nginx_not_to_buffer_them(tmp_path, headers, added):
    async def play():
        start = {**START, "headers": headers}
        async with process(tmp_path, answering(start, END)) as instance:
            request = Request(instance)
            await request.answer()
            expected = [(b"x-accel-buffering", b"no")] if added else []
            assert request.sent[0]["headers"] == headers + expected
            assert start["headers"] is headers

    asyncio.run(play())

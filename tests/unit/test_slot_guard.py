"""The guard without a server: slots, refusals, admin answers, loading; its clients are hand-made."""

import asyncio
import gc
import json
import logging
import threading
import time
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slot_guard import Settings, SlotGuard
from slot_guard.loading import LoadError, import_app

GATEWAY = [(b"x-gpufleet-instance", b"a-gpu01-0")]


def make_guard(app, slots=2, **settings):
    environment = {"SLOT_GUARD_APP": "x:y", "SLOT_GUARD_SLOTS": str(slots), "SLOT_GUARD_FAILURES": "99", **settings}
    return SlotGuard(Settings.from_environment(environment), load=lambda: app)


@asynccontextmanager
async def running(guard):
    """Run the guard's lifespan as a server does, and wait until it has loaded."""
    events, answers = asyncio.Queue(), asyncio.Queue()
    server = asyncio.create_task(guard({"type": "lifespan", "state": {}}, events.get, answers.put))
    await events.put({"type": "lifespan.startup"})
    assert (await answers.get())["type"] == "lifespan.startup.complete"
    while guard.state == "loading":
        await asyncio.sleep(0.001)
    yield guard
    await events.put({"type": "lifespan.shutdown"})
    assert (await answers.get())["type"] == "lifespan.shutdown.complete"
    await server


class Request:
    """One request of a server that, like Gunicorn, cancels its task when the client hangs up."""

    def __init__(self, guard, path="/", kind="http", headers=(), client=("127.0.0.1", 1), method="POST"):
        self.sent = []
        self.stuck = None
        """Set to an event, it holds every send, as a client does who does not read."""
        self.refused_status = None
        """An answer's head with this status is not taken."""
        self._events = asyncio.Queue()
        self._events.put_nowait({"type": "http.request"} if kind == "http" else {"type": "websocket.connect"})
        scope = {"type": kind, "method": method, "path": path, "headers": list(headers), "client": client}
        self.server = asyncio.create_task(guard(scope, self._events.get, self._send))

    async def _send(self, message):
        if self.stuck:
            await self.stuck.wait()
        if message["type"] == "http.response.start" and message["status"] == self.refused_status:
            raise ValueError(f"status {message['status']}")
        self.sent.append(message)

    async def hang_up(self):
        self.server.cancel()
        await asyncio.wait([self.server])

    async def disconnect(self):
        """Leave as under a server that only says so, and wait until the request is over."""
        self._events.put_nowait({"type": "http.disconnect"})
        await asyncio.wait([self.server])

    async def answer(self):
        """Wait for the answer: (status, headers, JSON or text)."""
        while not any(message["type"] == "http.response.body" for message in self.sent):
            await asyncio.sleep(0)
        body = self.sent[1]["body"].decode()
        headers = dict(self.sent[0]["headers"])
        self._events.put_nowait({"type": "http.disconnect"})
        await asyncio.wait([self.server])
        return self.sent[0]["status"], headers, json.loads(body) if body[:1] == "{" else body


def run_quietly(play):
    """Run a coroutine whose many failing requests are not to be logged."""
    logging.disable(logging.CRITICAL)
    try:
        asyncio.run(play)
    finally:
        logging.disable(logging.NOTSET)


async def settle():
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def answer_ok(send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


class Puppet:
    """An app whose calls do what the test says."""

    def __init__(self):
        self.calls = []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            raise NotImplementedError
        orders, jobs = asyncio.Queue(), []
        self.calls.append((orders, jobs))
        while (order := await orders.get()) != "return":
            if order == "raise":
                raise RuntimeError("as told")
            if order == "job":
                ending = threading.Event()
                jobs.append((asyncio.get_running_loop().run_in_executor(None, ending.wait), ending))
            elif order == "receive":
                await receive()
        await answer_ok(send)


ORDERS = st.sampled_from(["start", "start", "return", "raise", "job", "end job", "hang up"])


@given(st.integers(1, 3), st.lists(st.tuples(ORDERS, st.integers(0, 9)), max_size=25))
def test_slots_are_held_by_calls_and_jobs_whatever_happens(slots, steps):
    async def play():
        puppet = Puppet()
        requests, calls = [], []  # of admitted requests; a call is [orders, jobs, has not ended]

        def held():
            return sum(alive or any(not future.done() for future, _ in jobs) for _, jobs, alive in calls)

        async def do(step, request, call):
            orders, jobs, alive = call
            if step == "hang up":
                await request.hang_up()
            elif step == "end job" and any(not future.done() for future, _ in jobs):
                future, ending = next(job for job in jobs if not job[0].done())
                ending.set()
                await future
            elif step in {"return", "raise", "job"} and alive:
                orders.put_nowait(step)
                call[2] = step == "job"

        try:
            async with running(make_guard(puppet, slots)) as guard:
                for step, which in steps:
                    if step == "start":
                        expected = held() < slots
                        request = Request(guard)
                        await settle()
                        assert (len(puppet.calls) > len(calls)) is expected
                        if expected:
                            requests.append(request)
                            calls.append([*puppet.calls[-1], True])
                        else:
                            assert (await request.answer())[0] == 429
                    elif calls:
                        await do(step, requests[which % len(calls)], calls[which % len(calls)])
                        await settle()
                    assert guard.slots.in_flight == held() <= slots
                for request, call in zip(requests, calls):
                    await do("return", request, call)
                    for _ in call[1]:
                        await do("end job", request, call)
                    with_error = (await asyncio.gather(request.server, return_exceptions=True))[0]
                    assert with_error is None or str(with_error) in {"", "as told"}
                await settle()
                assert guard.slots.in_flight == 0
                assert sum(guard.requests[outcome] for outcome in ("served", "failed")) == len(calls)
        finally:  # threads that wait on would keep a failing test from ending
            for _, jobs in puppet.calls:
                for _, ending in jobs:
                    ending.set()

    run_quietly(play())


def test_a_job_that_never_began_frees_its_slot():
    async def play():
        release = threading.Event()

        async def app(scope, receive, send):
            loop = asyncio.get_running_loop()
            loop.run_in_executor(None, release.wait)
            loop.run_in_executor(None, release.wait).cancel()
            await answer_ok(send)

        async with running(make_guard(app)) as guard:
            asyncio.get_running_loop()._default_executor._max_workers = 1
            await Request(guard).answer()
            in_flight = guard.slots.in_flight
            release.set()
            await guard.slots.all_free()
            assert in_flight == 1

    asyncio.run(play())


def test_a_request_ends_in_the_tick_of_its_app():
    async def play():
        puppet = Puppet()
        async with running(make_guard(puppet, slots=1)) as guard:
            for _ in range(20):
                request = Request(guard)
                await settle()
                puppet.calls[-1][0].put_nowait("return")
                while len(request.sent) < 2:
                    await asyncio.sleep(0)
                # The client has its answer and asks again in the same tick.
            assert guard.requests["refused"] == 0

    asyncio.run(play())


def test_an_app_blocked_in_a_send_goes_on_when_its_client_leaves():
    async def play():
        ended = asyncio.Event()

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"piece", "more_body": True})
            if await receive() == {"type": "http.disconnect"}:
                ended.set()

        async with running(make_guard(app)) as guard:
            request = Request(guard)
            request.stuck = asyncio.Event()
            await settle()
            assert guard.slots.in_flight == 1
            await request.hang_up()
            await asyncio.wait_for(ended.wait(), 5)
            await settle()
            assert (guard.slots.in_flight, guard.requests["served"], request.sent) == (0, 1, [])

    asyncio.run(play())


def test_an_answer_takes_two_turns_of_the_event_loop():
    """One for the app and one for the server's send: a slow host pays each of them many times over."""

    async def play():
        async def app(scope, receive, send):
            await receive()
            await answer_ok(send)

        async with running(make_guard(app)) as guard:
            request = Request(guard)
            await asyncio.sleep(0)  # the server calls the guard
            for _ in range(2):
                assert request.sent == []
                await asyncio.sleep(0)
            assert [message["type"] for message in request.sent] == ["http.response.start", "http.response.body"]
            await request.answer()

    asyncio.run(play())


@pytest.mark.parametrize("handled", [False, True])
def test_a_head_that_the_server_does_not_take_fails_the_next_send_and_is_not_followed(handled):
    async def play():
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 99, "headers": []})
            try:
                await send({"type": "http.response.body", "body": b"not to be sent"})
            except ValueError:
                if not handled:
                    raise
                await answer_ok(send)

        async with running(make_guard(app)) as guard:
            request = Request(guard)
            request.refused_status = 99
            (error,) = await asyncio.gather(request.server, return_exceptions=True)
            assert isinstance(error, ValueError) is not handled
            assert [message.get("status") for message in request.sent] == ([200, None] if handled else [])

    run_quietly(play())


def test_a_head_that_the_server_does_not_take_and_nothing_follows_fails_the_request():
    async def play():
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 99, "headers": []})

        async with running(make_guard(app)) as guard:
            request = Request(guard)
            request.refused_status = 99
            with pytest.raises(ValueError, match="99"):
                await request.server
            assert (guard.slots.in_flight, guard.requests["failed"]) == (0, 1)

    asyncio.run(play())


def test_a_cancelled_receive_loses_no_message():
    async def play():
        async def app(scope, receive, send):
            assert await receive() == {"type": "http.request"}
            for _ in range(2):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(receive(), 0.001)
            await answer_ok(send)
            assert await receive() == {"type": "http.disconnect"}

        async with running(make_guard(app)) as guard:
            await Request(guard).answer()
            assert guard.requests == {"served": 1, "failed": 0, "refused": 0}

    asyncio.run(play())


@pytest.mark.parametrize(
    ("status", "complete", "outcome"),
    [
        (200, True, "served"),
        (404, True, "served"),
        (500, True, "failed"),
        (503, True, "failed"),
        (200, False, "failed"),
    ],
)
def test_outcomes(status, complete, outcome):
    async def play():
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": status, "headers": []})
            if complete:
                await send({"type": "http.response.body", "body": b""})

        async with running(make_guard(app)) as guard:
            await Request(guard).server
            assert guard.requests == {"served": 0, "failed": 0, "refused": 0, outcome: 1}

    asyncio.run(play())


def test_an_exception_after_the_answer_is_logged_by_the_guard(caplog):
    async def play():
        async def app(scope, receive, send):
            await answer_ok(send)
            raise RuntimeError("in the background")

        async with running(make_guard(app)) as guard:
            with pytest.raises(RuntimeError):
                await Request(guard).server
            assert guard.requests["failed"] == 1

    asyncio.run(play())
    assert "RuntimeError: in the background" in caplog.text


@pytest.mark.parametrize(("headers", "status"), [((), 503), (GATEWAY, 429)])
@pytest.mark.parametrize("state", ["loading", "stopping", "failed"])
def test_states_that_refuse(state, headers, status):
    async def play():
        guard = make_guard(answer_ok)
        guard.state = state
        got, headers_sent, error = await Request(guard, headers=headers).answer()
        assert (got, headers_sent[b"x-slot-guard"].decode()) == (status, state)
        assert int(headers_sent[b"retry-after"]) > 0
        assert set(error["error"]) == {"code", "message", "type", "timestamp"}
        assert (await Request(guard, "/_slot_guard/ready").answer())[0] == 503
        assert (await Request(guard, "/_slot_guard/live").answer())[0] == 200

    asyncio.run(play())


def test_a_stop_waits_for_work():
    async def play():
        puppet = Puppet()
        async with running(make_guard(puppet)) as guard:
            request = Request(guard)
            await settle()
            stop = asyncio.get_running_loop().call_later(0.05, puppet.calls[0][0].put_nowait, "return")
        assert stop.when() <= asyncio.get_running_loop().time()
        assert guard.state == "stopping"
        assert request.sent[0]["status"] == 200

    asyncio.run(play())


@pytest.mark.parametrize(
    ("peer", "headers", "status"),
    [
        (("127.0.0.1", 1), (), 200),
        (("::1", 1), (), 200),
        (("::ffff:127.0.0.1", 1), (), 200),
        (("10.0.0.1", 1), (), 200),
        (("::ffff:10.0.0.1", 1), (), 200),
        (("192.168.7.9", 1), (), 200),
        (("10.0.0.2", 1), (), 404),
        (("192.168.8.1", 1), (), 404),
        (("unix", 1), (), 404),
        (None, (), 404),
        (("127.0.0.1", 1), GATEWAY, 404),
        (("10.0.0.1", 1), GATEWAY, 404),
    ],
)
def test_who_may_ask(peer, headers, status):
    async def play():
        guard = make_guard(answer_ok, SLOT_GUARD_ADMIN_FROM="10.0.0.1, 192.168.7.0/24")
        assert (await Request(guard, "/_slot_guard/status", headers=headers, client=peer).answer())[0] == status

    asyncio.run(play())


def test_status_and_metrics_as_httpx_sees_them():
    async def play():
        settings = {"SLOT_GUARD_INSTANCE": 'a"b\\c', "SLOT_GUARD_VERSION": "v1"}
        async with (
            running(make_guard(Puppet(), **settings)) as guard,
            httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://gpu") as client,
        ):
            guard.requests["served"] = 123456789
            status = (await client.get("/_slot_guard/status")).json()
            text = (await client.get("/_slot_guard/metrics")).text
        assert (status["instance"], status["version"], status["app"]) == ('a"b\\c', "v1", "x:y")
        assert (status["state"], status["slots"], status["in_flight"]) == ("ready", 2, 0)
        assert status["since"].endswith("+00:00")
        assert 0 <= time.time() - status["started"] < 60
        assert f'slot_guard_start_time_seconds{{instance="a\\"b\\\\c",version="v1"}} {status["started"]}\n' in text
        assert 'served"} 123456789\n' in text
        assert 'slot_guard_slots{instance="a\\"b\\\\c",version="v1"} 2\n' in text

    asyncio.run(play())


def test_web_sockets_hold_a_slot_and_are_refused_with_a_close():
    async def play():
        puppet = Puppet()
        async with running(make_guard(puppet, slots=1)) as guard:
            first = Request(guard, kind="websocket")
            await settle()
            second = Request(guard, kind="websocket")
            await second.server
            assert second.sent == [{"type": "websocket.close", "code": 1013}]
            admin = Request(guard, "/_slot_guard/status", kind="websocket")
            await admin.server
            assert admin.sent == [{"type": "websocket.close", "code": 1008}]
            for order in ("receive", "receive", "return"):
                puppet.calls[0][0].put_nowait(order)
            await settle()
            assert guard.slots.in_flight == 1
            await first.hang_up()
            await settle()
            assert guard.slots.in_flight == 0

    asyncio.run(play())


def test_a_failed_load_is_logged_and_acted_on_once(caplog):
    def load():
        raise OSError("no weights")

    async def play():
        failures = []
        guard = SlotGuard(Settings("x:y"), load, on_failure=lambda: failures.append(guard.state))
        async with running(guard):
            assert failures == ["failed"]

    asyncio.run(play())
    assert "OSError: no weights" in caplog.text


def test_the_apps_lifespan_sees_start_stop_and_state():
    seen = []

    async def app(scope, receive, send):
        seen.append((await receive())["type"])
        scope["state"]["model"] = "loaded"
        await send({"type": "lifespan.startup.complete"})
        seen.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.failed", "message": "could not save"})

    async def play():
        state = {}
        guard = make_guard(app)
        events, answers = asyncio.Queue(), asyncio.Queue()
        server = asyncio.create_task(guard({"type": "lifespan", "state": state}, events.get, answers.put))
        for event in ("startup", "shutdown"):
            await events.put({"type": f"lifespan.{event}"})
            await answers.get()
            while guard.state == "loading":
                await asyncio.sleep(0.001)
        await server
        assert state == {"model": "loaded"}

    asyncio.run(play())
    assert seen == ["lifespan.startup", "lifespan.shutdown"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "SLOT_GUARD_APP is ''"),
        ({"SLOT_GUARD_APP": "module"}, "SLOT_GUARD_APP is 'module'"),
        ({"SLOT_GUARD_APP": "a:b", "SLOT_GUARD_SLOTS": "0"}, "SLOT_GUARD_SLOTS is '0'"),
        ({"SLOT_GUARD_APP": "a:b", "SLOT_GUARD_SLOTS": "two"}, "SLOT_GUARD_SLOTS is 'two'"),
        ({"SLOT_GUARD_APP": "a:b", "SLOT_GUARD_ADMIN_FROM": "gateway"}, "SLOT_GUARD_ADMIN_FROM"),
    ],
)
def test_settings_are_refused_by_name(variables, said):
    with pytest.raises(ValueError, match=said):
        Settings.from_environment(variables)


def test_importing_an_app():
    assert import_app("json.decoder:JSONDecoder.decode") is json.JSONDecoder.decode
    with pytest.raises(LoadError, match="json:__name__ is a str"):
        import_app("json:__name__")


def test_nothing_is_left_behind(caplog):
    """Tasks and futures that nobody awaited would be reported when they are collected."""

    async def play():
        puppet = Puppet()
        async with running(make_guard(puppet, slots=4)) as guard:
            requests = [Request(guard) for _ in range(3)]
            await settle()
            puppet.calls[0][0].put_nowait("raise")
            puppet.calls[1][0].put_nowait("receive")
            await requests[1].hang_up()
            for call in puppet.calls[1:]:
                call[0].put_nowait("return")
            await asyncio.gather(*(request.server for request in requests), return_exceptions=True)
            await settle()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(play())
    gc.collect()
    assert "never retrieved" not in caplog.text
    assert "destroyed" not in caplog.text

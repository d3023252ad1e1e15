"""Requests that wait for a slot: in which order they get one, and who gets none."""

import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slot_guard import Settings, guard

from tests.unit.service_helpers import FROM_GATEWAY, hang_up, read_ledger, running, serving, wait_for
from tests.unit.test_slot_guard import GATEWAY, Puppet, Request, answer_ok, make_guard, settle
from tests.unit.test_slot_guard import running as running_guard

SLOT = "/_slot_guard/slot"


def question(guard, name, waited=0.0):
    """The gateway's question for a slot for the request `name`, which has waited elsewhere before."""
    queued = f"{1000 - waited} 1000.000".encode()
    return Request(guard, SLOT, headers=[(b"x-request-id", name.encode()), (b"x-gpufleet-queued", queued)])


def status_of(request):
    """The status that a question was answered with, or None while it waits."""
    return request.sent[0]["status"] if request.sent else None


async def quick(scope, receive, send):
    """An app that answers at once."""
    if scope["type"] == "lifespan":
        raise NotImplementedError
    await answer_ok(send)


STEPS = st.sampled_from(["direct", "ask", "ask", "ask", "claim", "claim", "end", "end", "leave", "send away"])


class Model:
    """What must hold of slots and queue, kept with sets and a sort."""

    def __init__(self, slots, queue):
        self.slots, self.queue = slots, queue
        self.waiting, self.kept, self.working = {}, {}, {}

    def let_in(self):
        """Give every free slot to who has waited longest."""
        while self.waiting and len(self.kept) + len(self.working) < self.slots:
            first = min(self.waiting, key=lambda name: self.waiting[name][0])
            self.kept[first] = self.waiting.pop(first)[1]


@given(st.integers(1, 3), st.integers(0, 4), st.lists(st.tuples(STEPS, st.integers(0, 9)), max_size=40))
def test_slots_go_to_who_waited_longest_and_never_to_more_than_there_are(slots, queue, steps):
    async def play():
        puppet = Puppet()
        model = Model(slots, queue)

        async def begin(number, name):
            before = len(puppet.calls)
            request = Request(instance, headers=[*GATEWAY, (b"x-request-id", name.encode())])
            await settle()
            if len(puppet.calls) > before:
                model.working[number] = (request, puppet.calls[-1][0])
            return len(puppet.calls) > before

        async with running_guard(make_guard(puppet, slots, SLOT_GUARD_QUEUE=str(queue))) as instance:
            for number, (step, which) in enumerate(steps):
                pick = sorted({"claim": model.kept, "end": model.working, "leave": model.waiting}.get(step, ()))
                chosen = pick[which % len(pick)] if pick else None
                free = len(model.kept) + len(model.working) < slots
                if step == "direct":
                    assert await begin(number, f"direct-{number}") is free
                elif step == "ask":
                    waited = float(which % 3)
                    asked = question(instance, str(number), waited)
                    await settle()
                    if free or len(model.waiting) < queue:
                        model.waiting[number] = ((-waited, number), asked)
                    else:
                        assert status_of(asked) == 403
                elif step == "send away":
                    gone, model.waiting = model.waiting, {}
                    assert instance.slots.send_away() == len(gone)
                    await settle()
                    assert {status_of(asked) for _, asked in gone.values()} <= {403}
                elif chosen is not None and step == "claim":
                    del model.kept[chosen]
                    assert await begin(chosen, str(chosen))
                elif chosen is not None and step == "end":
                    model.working.pop(chosen)[1].put_nowait("return")
                elif chosen is not None:
                    await model.waiting.pop(chosen)[1].hang_up()
                await settle()
                model.let_in()
                assert {status_of(asked) for asked in model.kept.values()} <= {200}
                assert {status_of(asked) for _, asked in model.waiting.values()} <= {None}
                assert instance.slots.waiting == len(model.waiting)
                assert instance.slots.in_flight == len(model.kept) + len(model.working) <= slots
            instance.slots.close_queue()
            for name in model.kept:
                assert await begin(name, str(name))
            for _, orders in model.working.values():
                orders.put_nowait("return")
            await settle()
            assert instance.slots.in_flight == 0

    asyncio.run(play())


def test_a_slot_whose_client_left_after_its_turn_goes_to_the_next(monkeypatch):
    monkeypatch.setattr(guard, "CLAIM_SECONDS", 0.05)

    async def play():
        puppet = Puppet()
        async with running_guard(make_guard(puppet, slots=1, SLOT_GUARD_QUEUE="1")) as instance:
            first, second = question(instance, "a"), question(instance, "b")
            await settle()
            assert (status_of(first), status_of(second), instance.slots.in_flight) == (200, None, 1)
            while status_of(second) is None:
                await asyncio.sleep(0.005)
            assert (status_of(second), instance.slots.in_flight) == (200, 1)
            late = Request(instance, headers=[*GATEWAY, (b"x-request-id", b"a")])
            assert (await late.answer())[0] == 429
            work = Request(instance, headers=[*GATEWAY, (b"x-request-id", b"b")])
            await settle()
            puppet.calls[0][0].put_nowait("return")
            assert (await work.answer())[0] == 200
            await asyncio.sleep(0.1)
            assert instance.slots.in_flight == 0, "what was claimed is given back once"

    asyncio.run(play())


def test_a_client_that_leaves_in_the_tick_of_its_turn_gives_the_slot_back():
    async def play():
        async with running_guard(make_guard(quick, slots=1, SLOT_GUARD_QUEUE="1")) as instance:
            slot = instance.slots.take()
            asked = question(instance, "a")
            await settle()
            slot.release()
            await asked.hang_up()
            assert (instance.slots.in_flight, instance.slots.waiting, asked.sent) == (0, 0, [])

    asyncio.run(play())


@pytest.mark.parametrize(
    ("queued", "seconds"),
    [
        (b"100.0 100.0", 1.0),
        (b"100.0 100.6", 0.4),
        (b"100.0 500.0", 0.0),
        (b"100.0 inf", 0.0),
        (b"500.0 100.0", 1.0),
        (b"100.0 nan", 1.0),
        (b"100.0", 1.0),
        (b"", 1.0),
    ],
)
def test_the_time_waited_at_other_gpus_counts(queued, seconds):
    async def play():
        settings = {"SLOT_GUARD_QUEUE": "1", "SLOT_GUARD_QUEUE_SECONDS": "1"}
        async with running_guard(make_guard(quick, slots=1, **settings)) as instance:
            slot = instance.slots.take()
            headers = [(b"x-request-id", b"a"), (b"x-gpufleet-queued", queued)]
            begun = time.monotonic()
            status, headers, error = await Request(instance, SLOT, headers=headers).answer()
            assert (status, headers[b"x-slot-guard"], error["error"]["code"]) == (403, b"full", "slots_full")
            assert seconds <= time.monotonic() - begun + 0.001 < seconds + 0.4
            assert (instance.slots.waiting, instance.requests["refused"]) == (0, 1)
            slot.release()

    asyncio.run(play())


def test_who_has_no_time_left_still_gets_a_slot_that_is_free():
    async def play():
        async with running_guard(make_guard(quick, slots=1, SLOT_GUARD_QUEUE="1")) as instance:
            assert (await question(instance, "a", waited=1000).answer())[0] == 200
            await Request(instance, headers=[(b"x-request-id", b"a")]).answer()

    asyncio.run(play())


@pytest.mark.parametrize("state", ["loading", "suspect", "stopping", "failed"])
def test_nobody_waits_for_an_instance_that_does_not_serve(state):
    async def play():
        instance = make_guard(answer_ok, SLOT_GUARD_QUEUE="1")
        instance.state = state
        status, headers, _ = await question(instance, "a").answer()
        assert (status, headers[b"x-slot-guard"].decode()) == (403, state)

    asyncio.run(play())


def easily_taken_out(app, tmp_path):
    """A guard with two slots and two places that one failure takes out."""
    settings = {"SLOT_GUARD_QUEUE": "2", "SLOT_GUARD_FAILURES": "1", "SLOT_GUARD_STATE": str(tmp_path)}
    return make_guard(app, slots=2, **settings)


def test_who_waits_for_an_instance_that_is_taken_out_goes_elsewhere(tmp_path):
    async def play():
        puppet = Puppet()
        async with running_guard(easily_taken_out(puppet, tmp_path)) as instance:
            long, short = Request(instance), Request(instance)
            await settle()
            waiting = [question(instance, name) for name in "ab"]
            await settle()
            puppet.calls[1][0].put_nowait("raise")
            await settle()
            assert [status_of(asked) for asked in waiting] == [403, 403]
            assert (instance.state, instance.slots.in_flight) == ("suspect", 1)
            puppet.calls[0][0].put_nowait("return")
            await asyncio.wait([long.server, short.server])
            assert isinstance(short.server.exception(), RuntimeError)

    asyncio.run(play())


def test_a_kept_slot_of_an_instance_that_was_taken_out_is_not_used(tmp_path):
    async def play():
        puppet = Puppet()
        async with running_guard(easily_taken_out(puppet, tmp_path)) as instance:
            failing = Request(instance)
            assert (await question(instance, "a").answer())[0] == 200
            puppet.calls[0][0].put_nowait("raise")
            await asyncio.wait([failing.server])
            assert instance.slots.in_flight == 1
            headers = [*GATEWAY, (b"x-request-id", b"a")]
            assert (await Request(instance, headers=headers).answer())[1][b"x-slot-guard"] == b"suspect"
            assert instance.slots.in_flight == 0
            assert isinstance(failing.server.exception(), RuntimeError)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("path", "headers", "client"),
    [
        (SLOT, [(b"x-request-id", b"a")], ("10.9.9.9", 1)),
        (SLOT, [(b"x-request-id", b"a"), *GATEWAY], ("127.0.0.1", 1)),
        (SLOT, [], ("127.0.0.1", 1)),
        ("/_slot_guard/send_away", [], ("10.9.9.9", 1)),
        ("/_slot_guard/send_away", GATEWAY, ("127.0.0.1", 1)),
    ],
)
def test_only_the_gateway_may_ask_for_slots_and_send_away(path, headers, client):
    async def play():
        instance = make_guard(answer_ok)
        assert (await Request(instance, path, headers=headers, client=client).answer())[0] == 404

    asyncio.run(play())


@pytest.mark.parametrize(("variable", "value"), [("QUEUE", "-1"), ("QUEUE", "two"), ("QUEUE_SECONDS", "0")])
def test_settings_are_refused_by_name(variable, value):
    with pytest.raises(ValueError, match=f"SLOT_GUARD_{variable} is '{value}'"):
        Settings.from_environment({"SLOT_GUARD_APP": "a:b", f"SLOT_GUARD_{variable}": value})


##### Under Gunicorn


@pytest.fixture
def server(tmp_path):
    """One slot, two places, and the path of the ledger of what ran."""
    ledger = tmp_path / "ledger"
    environment = {
        "SLOT_GUARD_SLOTS": "1",
        "SLOT_GUARD_QUEUE": "2",
        "SLOT_GUARD_INSTANCE": "gpu-0",
        "WORK_LEDGER": str(ledger),
        "WORK_SECONDS": "1.5",
    }
    with serving(tmp_path, "plain:app", **environment) as started:
        started.ledger = ledger
        yield started


def ask_for_slot(server, name):
    """Send the gateway's question and return its connection."""
    return server.send(f"GET {SLOT} HTTP/1.1\r\nHost: x\r\nX-Request-ID: {name}\r\nConnection: close\r\n\r\n".encode())


def waiting(server):
    return server.status()["waiting"]


def test_a_client_that_hangs_up_while_it_waits_frees_its_place_at_once(server):
    work = server.begin("/", "works")
    wait_for(lambda: running(server.ledger) == 1)
    places = [ask_for_slot(server, name) for name in "ab"]
    wait_for(lambda: waiting(server) == 2)
    assert ask_for_slot(server, "c").recv(12) == b"HTTP/1.1 403"
    assert b'slot_guard_waiting{instance="gpu-0",version=""} 2\n' in server.ask("GET", "/_slot_guard/metrics")[2]
    hang_up(places[0])
    places[1].close()
    wait_for(lambda: waiting(server) == 0, 0.5)
    last = ask_for_slot(server, "d")
    wait_for(lambda: waiting(server) == 1)
    assert work.recv(12) == b"HTTP/1.1 200"
    assert last.recv(12) == b"HTTP/1.1 200"
    refused = server.ask("POST", "/", headers={"X-Request-ID": "e", **FROM_GATEWAY})
    assert (refused[0], refused[1]["X-Slot-Guard"]) == (429, "full"), "the slot is kept for the one whose turn it is"
    assert server.ask("POST", "/", headers={"X-Request-ID": "d", **FROM_GATEWAY})[0] == 200
    assert [line["request"] for line in read_ledger(server.ledger)] == ["works", "works", "d", "d"]


def test_who_waits_is_sent_away_with_the_signal_to_stop(server):
    work = server.begin("/", "works")
    wait_for(lambda: running(server.ledger) == 1)
    place = ask_for_slot(server, "a")
    wait_for(lambda: waiting(server) == 1)
    server.process.terminate()
    assert place.recv(12) == b"HTTP/1.1 403"
    assert running(server.ledger) == 1, "told while the work goes on"
    assert work.recv(12) == b"HTTP/1.1 200"
    assert server.process.wait(10) == 0


def test_an_operator_can_send_away_who_waits(server):
    work = server.begin("/", "works")
    wait_for(lambda: running(server.ledger) == 1)
    place = ask_for_slot(server, "a")
    wait_for(lambda: waiting(server) == 1)
    assert server.ask("GET", "/_slot_guard/send_away")[0] == 404
    assert json.loads(server.ask("POST", "/_slot_guard/send_away")[2]) == {"sent_away": 1}
    assert place.recv(12) == b"HTTP/1.1 403"
    assert work.recv(12) == b"HTTP/1.1 200"

"""The gateway's agent against real HTTP servers on loopback: what it asks, decides, flags and tells."""

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_agent import agent as agent_module
from fleet_agent import drains
from fleet_agent.agent import Agent
from fleet_agent.asking import MAX_ANSWER, ask, ask_all
from fleet_agent.config import Config, ConfigError, ConfigFile, Instance
from fleet_agent.decision import DOWN, GUARD_STATES, READY, SILENT, Answer, Standing, decide
from fleet_agent.edition import Reply
from fleet_agent.flags import Flags
from fleet_agent.server import StatusServer
from fleet_agent.status import View, document, health, metrics
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.service_helpers import Server, serving, wait_for

PROJECT = Path(__file__).parents[2]
SINCE = "2026-01-01T00:00:00+00:00"
CHANGE = {"time": SINCE, "what": "drain", "instance": "tts-gpu01-0", "from": "serving", "to": "drained", "result": "ok"}


def status_answer(state="ready", **changes):
    """Bytes of a guard's answer."""
    status = {"state": state, "since": SINCE, "version": "f00d"}
    counts = {"in_flight": 0, "waiting": 3, "served": 5, "refused": 1, "failed": 0}
    body = json.dumps({**status, **counts, **changes}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Guard:
    """An HTTP server on loopback that answers with `answer`: bytes, or None for never."""

    def __init__(self, address="127.0.0.1"):
        self.address = address
        self.port = 0
        self.answer = status_answer()
        self.requests = []
        self.sent = 0
        self._server = None

    async def start(self):
        self._server = await asyncio.start_server(self._serve, self.address, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self):
        self._server.close()

    async def _serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            if self.answer is None:
                await reader.read()
            elif callable(self.answer):
                await self.answer(writer)
            else:
                writer.write(self.answer)
                await writer.drain()
        writer.close()


class Fleet:
    """Guards on loopback and the files of an agent that watches them."""

    def __init__(self, folder, guards):
        self.guards = {f"tts-gpu{number:02}-0": guard for number, guard in enumerate(guards)}
        self.down, self.drain = folder / "run/down", folder / "drain"
        self.socket, self.config = folder / "run/http.sock", folder / "agent.json"
        self.audit_log = folder / "audit.log"
        self.down.mkdir(parents=True)
        self.drain.mkdir()
        self.agents = []

    def write(self, share=0.5, only=None):
        """Write the configuration, of all guards or of some."""
        instances = [
            {"id": name, "service": "tts", "host": name[4:9], "gpu": 0, "slots": 2}
            | {"address": guard.address, "port": guard.port}
            for name, guard in self.guards.items()
            if only is None or name in only
        ]
        paths = {"down_directory": self.down, "drain_directory": self.drain, "socket": self.socket}
        paths["audit_log"] = self.audit_log
        given = {"cluster": "c", "silence_share": share, "instances": instances}
        unfinished = self.config.with_suffix(".new")
        unfinished.write_text(json.dumps(given | {name: str(path) for name, path in paths.items()}))
        unfinished.replace(self.config)

    @property
    def flagged(self):
        return {path.name for path in self.down.iterdir()}

    def agent(self):
        self.agents.append(Agent(ConfigFile(self.config)))
        return self.agents[-1]


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """A function that runs `scenario(fleet, *guards)` with started guards. Silence is told after 0.4 s."""
    monkeypatch.setattr(agent_module, "DEADLINE_SECONDS", 0.4)

    def run(scenario, guards=6, share=0.5):
        async def with_guards():
            started = [Guard() for _ in range(guards)]
            for guard in started:
                await guard.start()
            made = Fleet(tmp_path, started)
            made.write(share)
            try:
                await scenario(made, *started)
            finally:
                for stopping in (*started, *made.agents):
                    stopping.close()

        asyncio.run(with_guards())

    return run


@contextlib.asynccontextmanager
async def process(fleet):
    """Run the agent as Supervisor does, and wait for its first pass."""
    command = [sys.executable, "-m", "fleet_agent", "--config", str(fleet.config)]
    with subprocess.Popen(command, cwd=PROJECT / "service/agent", stderr=subprocess.PIPE, text=True) as running:
        try:
            await in_thread(wait_for, fleet.socket.exists)
            yield running
        finally:
            running.kill()


async def in_thread(function, *arguments):
    """Let the guards go on while the test waits."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


##### Asking


def one(guard):
    return Instance("tts-gpu00-0", "tts", "gpu00", 0, guard.address, guard.port, 2)


def asked(answer, address="127.0.0.1"):
    """What comes of asking a guard that answers so, within a second."""

    async def scenario():
        guard = Guard(address)
        guard.answer = answer
        await guard.start()
        try:
            answers, _ = await ask_all([one(guard)], 1.0)
            return answers["tts-gpu00-0"]
        finally:
            guard.close()

    return asyncio.run(scenario())


@pytest.mark.parametrize("state", sorted(GUARD_STATES))
def test_what_a_guard_says_of_itself(state):
    answer = asked(status_answer(state, reason="a\nb", in_flight=2))
    numbers = {"in_flight": 2, "waiting": 3, "served": 5, "refused": 1, "failed": 0, "version": "f00d", "warning": ""}
    assert answer == Answer(state, "a b", SINCE, numbers)


def test_who_waits_is_shown_and_summed_and_old_guards_say_nothing_of_it():
    view = view_of(EQUAL)
    standing = view.standings["tts-gpu01-0"]
    standings = {**view.standings, "tts-gpu01-0": replace(standing, numbers={**standing.numbers, "waiting": 3})}
    seen = document(replace(view, standings=standings))
    assert [entry["waiting"] for entry in seen["instances"]] == [3, *[None] * 5]
    assert seen["totals"]["waiting"] == seen["services"]["tts"]["waiting"] == 3
    assert metrics(seen, 0).count("gpufleet_instance_waiting{") == 1


def test_a_guard_under_gunicorn_is_understood(tmp_path):
    """The article's app as printed, which blocks its event loop: that shows on the page."""
    with serving(tmp_path, "App_Http_Server:app", wait=Server.is_ready, SLOT_GUARD_VERSION="f00d") as server:
        instance = Instance("tts-gpu00-0", "tts", "gpu00", 0, "localhost", server.port, 2)
        answer = asyncio.run(ask(instance))
        assert (answer.state, answer.numbers["in_flight"], answer.numbers["version"]) == ("ready", 0, "f00d")
        assert answer.numbers["warning"] == ""
        assert server.post("/AIVoice/TTS/CosyVoice2/audio-generate")[0] == 200
        answer = asyncio.run(ask(instance))
    standing = Standing(answer.state, answer.reason, answer.since, answer.numbers)
    config = Config("c", 0.5, Path("/down"), Path("/drain"), Path("/audit"), Path("/sock"), (instance,))
    seen = document(View(config, {instance.id: standing}, {}, "", SINCE, 0.2))
    (entry,) = seen["instances"]
    told = r"blocks its event loop, once, for [0-2]\.\d s at worst, in audio_generate \(App_Http_Server\.py, line \d+\)"
    assert re.fullmatch(told, entry["warning"]), entry
    assert (entry["state"], entry["reason"], seen["status"]) == ("ready", None, "healthy")


def test_a_refused_connection_is_definite():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        instance = Instance("tts-gpu00-0", "tts", "gpu00", 0, "127.0.0.1", unused.getsockname()[1], 2)
        assert asyncio.run(ask(instance)) == Answer(DOWN, "refuses connections")


@pytest.mark.parametrize("address", ["no host.invalid", "a" * 300, "240.0.0.1"])
def test_an_address_that_leads_nowhere_is_silence(address):
    instance = Instance("tts-gpu00-0", "tts", "gpu00", 0, address, 9, 2)
    answers, _ = asyncio.run(ask_all([instance], 0.3))
    assert answers["tts-gpu00-0"].state == SILENT


def test_an_ipv6_address_may_have_brackets():
    instance = Instance("tts-gpu00-0", "tts", "gpu00", 0, "[::1]", 9, 2)
    assert asyncio.run(ask(instance)).state in {DOWN, SILENT}


def body(text):
    return b"HTTP/1.1 200 OK\r\n\r\n" + text


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 500 Oh\r\n\r\n" + status_answer().partition(b"\r\n\r\n")[2],
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{}",
        status_answer()[:-3],
        body(b"<html>"),
        body(b"\xff\xfe"),
        body(b"[]"),
        body(b'{"state": ["ready"], "in_flight": 0}'),
        body(b'{"state": "splendid", "in_flight": 0}'),
        body(b'{"state": "ready"}'),
        body(b'{"state": "ready", "in_flight": NaN}'),
        body(b'{"state": "ready", "in_flight": true}'),
        body(b'{"state": "ready", "in_flight": -1}'),
        body(b'{"state": "ready", "in_flight": 1e3}'),
        body(b'{"state": "ready", "in_flight": ' + b"9" * 5000 + b"}"),
        body(b"[" * 60_000),
    ],
    ids=range(21),
)
def test_what_is_no_status_is_silence_with_a_reason(answer):
    seen = asked(answer)
    assert seen.state == SILENT
    assert seen.reason.startswith("answers without a status: ")
    assert len(seen.reason) < 300


@pytest.mark.parametrize("head", [b"\r\n", b"X: ", b"Content-Length: 99999999\r\n\r\n"], ids=range(3))
def test_a_huge_answer_is_cut_off(head):
    sent = 0

    async def scenario():
        guard = Guard()

        async def flood(writer):
            nonlocal sent
            writer.write(b"HTTP/1.1 200 OK\r\n" + head)
            for _ in range(2000):
                writer.write(b" " * 50_000)
                await writer.drain()
                sent += 50_000

        guard.answer = flood
        await guard.start()
        answers, _ = await ask_all([one(guard)], 1.0)
        guard.close()
        return answers["tts-gpu00-0"]

    seen = asyncio.run(scenario())
    assert seen.state == SILENT and "no answer within" not in seen.reason
    assert sent < 100 * MAX_ANSWER, "the buffers of the kernel, but not the 100 MB"


def test_counts_that_make_no_sense_are_left_out():
    answer = asked(status_answer(waiting=None, served="many", failed=-1, version=7))
    assert answer.state == READY
    assert answer.numbers == {"in_flight": 0, "refused": 1, "version": "", "warning": ""}


def test_half_a_character_in_a_reason_stops_neither_flag_nor_page(fleet):
    async def scenario(made, guard, *_):
        guard.answer = status_answer("failed", reason="half: \ud800")
        await made.agent().make_pass()
        assert (made.down / "tts-gpu00-0").read_text() == "failed: half: ?\n"
        assert b'"reason": "half: ?"' in await in_thread(fetch, made.socket, b"GET /cluster/status HTTP/1.0\r\n\r\n")

    fleet(scenario)


##### Deciding


@pytest.mark.parametrize("state", sorted(GUARD_STATES - {READY}))
def test_an_instance_that_is_not_ready_is_flagged_at_once_and_cleared_at_once(fleet, state):
    async def scenario(made, guard, *_):
        agent = made.agent()
        guard.answer = status_answer(state)
        await agent.make_pass()
        assert made.flagged == {"tts-gpu00-0"}
        assert (made.down / "tts-gpu00-0").read_text().startswith(f"{state}: ")
        guard.answer = status_answer()
        await agent.make_pass()
        assert made.flagged == set()

    fleet(scenario)


def test_a_dead_process_is_flagged_at_once(fleet):
    async def scenario(made, guard, *_):
        agent = made.agent()
        guard.close()
        view = await agent.make_pass()
        assert made.flagged == {"tts-gpu00-0"}
        assert view.state("tts-gpu00-0") == "down"
        await guard.start()
        await agent.make_pass()
        assert made.flagged == set()

    fleet(scenario)


def test_what_gets_ready_between_two_passes_waits_for_none(fleet, monkeypatch):
    monkeypatch.setattr(agent_module, "INTERVAL_SECONDS", 60.0)

    async def scenario(made, loading, dead, well, *_):
        loading.answer = status_answer("loading")
        dead.close()
        running = asyncio.create_task(made.agent().run())
        try:
            await in_thread(wait_for, lambda: made.flagged == {"tts-gpu00-0", "tts-gpu01-0"})
            loading.answer = status_answer()
            await in_thread(wait_for, lambda: made.flagged == {"tts-gpu01-0"})
            await dead.start()
            await in_thread(wait_for, lambda: made.flagged == set())
        finally:
            running.cancel()
        assert len(well.requests) == 3  # one for each pass: between passes nobody asks what serves

    fleet(scenario)


def test_all_may_be_flagged_on_their_own_word(fleet):
    async def scenario(made, *guards):
        agent = made.agent()
        for guard in guards:
            guard.answer = status_answer("loading")
        await agent.make_pass()
        assert made.flagged == set(made.guards)

    fleet(scenario)


def test_silence_counts_from_the_second_pass_on(fleet):
    async def scenario(made, guard, *_):
        agent = made.agent()
        guard.answer = None
        view = await agent.make_pass()
        assert made.flagged == set()
        assert view.state("tts-gpu00-0") == "ready"
        view = await agent.make_pass()
        assert made.flagged == {"tts-gpu00-0"}
        assert (view.state("tts-gpu00-0"), view.standings["tts-gpu00-0"].reason) == ("down", "no answer within 0.4 s")
        guard.answer = status_answer()
        await agent.make_pass()
        assert made.flagged == set()

    fleet(scenario)


def test_two_misses_that_are_not_in_a_row_are_none(fleet):
    async def scenario(made, guard, *_):
        agent = made.agent()
        for answer in (None, status_answer(), None, status_answer()):
            guard.answer = answer
            await agent.make_pass()
            assert made.flagged == set()

    fleet(scenario)


def test_silence_of_more_than_the_share_changes_nothing(fleet, caplog):
    async def scenario(made, *guards):
        agent = made.agent()
        for guard in guards[:3]:
            guard.answer = None
        for _ in range(2):
            await agent.make_pass()
        half = {"tts-gpu00-0", "tts-gpu01-0", "tts-gpu02-0"}
        assert made.flagged == half
        for guard in guards[3:]:
            guard.answer = None
        for _ in range(4):
            view = await agent.make_pass()
            assert made.flagged == half
        assert "more than 0.5 of all instances are silent" in view.warning
        assert document(view)["status"] == "degraded"
        for guard in guards[1:]:
            guard.answer = status_answer()
        await agent.make_pass()
        assert made.flagged == {"tts-gpu00-0"}

    fleet(scenario)
    assert len([record for record in caplog.records if "are silent" in record.message]) == 1


def test_an_agent_without_cpu_counts_no_silence(fleet):
    async def scenario(made, guard, blocker):
        async def block(writer):
            time.sleep(0.5)  # the agent's own loop, since the guard shares it
            writer.write(status_answer())

        agent = made.agent()
        guard.answer, blocker.answer = None, block
        for _ in range(4):
            view = await agent.make_pass()
            assert made.flagged == set()
        assert "silence is not counted" in view.warning

    fleet(scenario, guards=2, share=1.0)


NAMES = [f"i{number}" for number in range(7)]
ANSWERS = st.sampled_from([SILENT, SILENT, DOWN, *sorted(GUARD_STATES)])
PASSES = st.lists(st.dictionaries(st.sampled_from(NAMES), ANSWERS), max_size=12)


@given(passes=PASSES, share=st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), size=st.integers(1, len(NAMES)))
def test_whatever_is_answered(passes, share, size):
    """Answers in any order, some missing: what must hold after every pass."""
    standings = {name: Standing() for name in NAMES[:size]}
    misses = dict.fromkeys(standings, 0)
    for number, states in enumerate(passes):
        answers = {name: Answer(state, "why: so" * (number % 2)) for name, state in states.items() if name in standings}
        decision = decide(standings, answers, share, f"time {number}")
        after = decision.standings
        stepped = decide(standings, answers, share, "1970").standings
        assert {name: standing.flag for name, standing in after.items() if standing.flagged} == {
            name: standing.flag for name, standing in stepped.items() if standing.flagged
        }
        assert after.keys() == standings.keys()
        assert sum(standing.by_silence for standing in after.values()) <= share * size
        for name, standing in after.items():
            state, before = states.get(name), standings[name]
            misses[name] = misses[name] + 1 if state == SILENT else misses[name] if state is None else 0
            if state is None:
                assert standing == before
            elif state != SILENT:
                assert (standing.state, standing.flagged, standing.by_silence) == (state, state != READY, False)
            else:
                assert standing.flagged >= before.flagged, "silence clears nothing"
                if misses[name] < 2 or decision.held:
                    assert (standing.flagged, standing.state) == (before.flagged, before.state)
                else:
                    assert (standing.flagged, standing.state) == (True, DOWN)
            assert standing.flagged == (standing.state != READY)
            if standing.flagged:
                again = Standing.from_flag(standing.flag, "now")
                assert (again.state, again.by_silence) == (standing.state, standing.by_silence)
        standings = dict(after)


def test_who_is_kept_out_by_silence_counts_even_where_it_was_not_asked():
    standings = {name: Standing() for name in NAMES[:6]}
    silence = Answer(SILENT, "why")
    for _ in range(2):
        standings = decide(standings, dict.fromkeys(NAMES[:3], silence), 0.5, "now").standings
    for _ in range(2):
        standings = decide(standings, dict.fromkeys(NAMES[3:6], silence), 0.5, "now").standings
    assert [name for name, standing in standings.items() if standing.flagged] == NAMES[:3]


##### Flags and configuration


def test_an_instance_that_leaves_takes_its_flag_along_and_a_new_one_is_asked(fleet):
    async def scenario(made, first, second, third):
        for guard in (first, second, third):
            guard.answer = status_answer("loading")
        made.write(only=["tts-gpu00-0", "tts-gpu01-0"])
        agent = made.agent()
        await agent.make_pass()
        assert made.flagged == {"tts-gpu00-0", "tts-gpu01-0"}
        assert not third.requests
        made.write(only=["tts-gpu01-0", "tts-gpu02-0"])
        view = await agent.make_pass()
        assert made.flagged == set(view.standings) == {"tts-gpu01-0", "tts-gpu02-0"}

    fleet(scenario, guards=3)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"instances": []}', "\udcff"])
def test_a_configuration_that_cannot_be_used_leaves_the_old_one_in_force(fleet, caplog, text):
    caplog.set_level("INFO")

    async def scenario(made, guard):
        agent = made.agent()
        await agent.make_pass()
        made.config.write_bytes(text.encode(errors="surrogateescape"))
        guard.answer = status_answer("loading")
        for _ in range(3):
            await agent.make_pass()
        assert made.flagged == {"tts-gpu00-0"}
        made.config.unlink()
        for _ in range(2):
            await agent.make_pass()
        made.write()
        await agent.make_pass()

    fleet(scenario, guards=1)
    said = [record.message for record in caplog.records if record.message.startswith("configuration")]
    assert len(said) == 4
    assert [line for line in said if "stays in force" in line] == said[:2]
    assert said[2:] == ["configuration: all right again", "configuration read again: 1 instances"]


@pytest.mark.parametrize("change", [{"silence_share": 2}, {"silence_share": "x"}, {"instances": []}, {"socket": None}])
def test_a_configuration_is_refused_with_a_reason(fleet, change):
    async def scenario(made, *_):
        given = json.loads(made.config.read_text()) | change
        with pytest.raises(ConfigError, match=r"silence_share|instances|not a configuration"):
            Config.parse(json.dumps(given).encode())

    fleet(scenario, guards=1)


@pytest.mark.parametrize("identifier", ["", ".", "../x", "a/b", ".x", 7])
def test_an_id_that_is_no_file_name_is_refused(fleet, identifier):
    async def scenario(made, *_):
        given = json.loads(made.config.read_text())
        given["instances"][0]["id"] = identifier
        with pytest.raises(ConfigError, match="name of a flag"):
            Config.parse(json.dumps(given).encode())

    fleet(scenario, guards=1)


def test_what_does_not_belong_among_the_flags_is_cleared(tmp_path):
    (tmp_path / "left").write_text("loading: of an instance that is gone\n")
    (tmp_path / ".half").touch()
    flags = Flags(tmp_path)
    assert flags.apply({"here": "down: x\n"}) == set()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"here": "down: x\n"}


def test_a_flag_that_cannot_be_written_keeps_none_of_the_others(fleet, caplog):
    caplog.set_level("INFO")

    async def scenario(made, *guards):
        agent = made.agent()
        for guard in guards[:2]:
            guard.answer = status_answer("loading")
        (made.down / ".tts-gpu00-0").mkdir()  # where the flag would be written
        for _ in range(3):
            view = await agent.make_pass()
            assert made.flagged == {".tts-gpu00-0", "tts-gpu01-0"}
            assert view.state("tts-gpu00-0") == "loading", "known, though not flagged"
        (made.down / ".tts-gpu00-0").rmdir()
        await agent.make_pass()
        assert made.flagged == {"tts-gpu00-0", "tts-gpu01-0"}

    fleet(scenario)
    said = [record.message for record in caplog.records if record.message.startswith("flags")]
    assert said == ["flags: Is a directory", "flags: all right again"]


def test_a_full_disk_is_said_once_and_the_agent_goes_on(fleet):
    async def scenario(made, first, second, *_):
        first.answer = status_answer("loading")
        async with process(made) as running:
            assert made.flagged == {"tts-gpu00-0"}
            unlimited = resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            second.answer = status_answer("loading")
            asked_before = len(second.requests)
            await in_thread(wait_for, lambda: len(second.requests) > asked_before + 3)
            assert "tts-gpu01-0" not in made.flagged
            first.answer = status_answer()
            await in_thread(wait_for, lambda: "tts-gpu00-0" not in made.flagged)
            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, unlimited)
            await in_thread(wait_for, lambda: made.flagged == {"tts-gpu01-0"})
            running.kill()
            log = await in_thread(running.stderr.read)
        assert log.count("File too large") == 1
        assert log.count("flags: all right again") == 1

    fleet(scenario)


def test_a_killed_agent_leaves_its_flags_and_the_next_one_takes_them_over(fleet):
    async def scenario(made, loading, silent, *_):
        loading.answer, silent.answer = status_answer("loading"), None
        both = {"tts-gpu00-0", "tts-gpu01-0"}
        async with process(made) as running:
            await in_thread(wait_for, lambda: made.flagged == both)
            running.send_signal(signal.SIGKILL)
            await in_thread(running.wait)
        assert made.flagged == both
        loading.answer = None
        view = await made.agent().make_pass()
        assert made.flagged == both, "silent, but only once: what the dead agent knew still holds"
        assert (view.state("tts-gpu00-0"), view.state("tts-gpu01-0")) == ("loading", "down")
        assert [view.standings[name].by_silence for name in sorted(both)] == [False, True]

    fleet(scenario)


def test_directories_that_come_later_are_used(fleet):
    async def scenario(made, guard, *_):
        made.down.rmdir()
        made.down.parent.rmdir()
        made.drain.rmdir()
        guard.answer = status_answer("loading")
        agent = made.agent()
        await agent.make_pass()
        made.down.mkdir(parents=True)
        made.drain.mkdir()
        (made.drain / "tts-gpu01-0").touch()
        view = await agent.make_pass()
        assert made.flagged == {"tts-gpu00-0"}
        assert view.state("tts-gpu01-0") == "drained"
        assert made.socket.is_socket()

    fleet(scenario)


RECORD = {"owner": "operator", "by": "alice@desk", "since": SINCE, "reason": "a new fan, at noon"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (json.dumps(RECORD), {"by": "operator", "since": SINCE, "reason": "a new fan, at noon"}),
        (
            json.dumps({**RECORD, "reason": "等新风扇\uff0c下午到"}),
            {"by": "operator", "since": SINCE, "reason": "等新风扇\uff0c下午到"},
        ),
        (json.dumps({**RECORD, "owner": "rollout", "reason": ""}), {"by": "rollout", "since": SINCE, "reason": None}),
        (json.dumps({**RECORD, "reason": "ask bob@desk"}), {"by": "operator", "since": SINCE, "reason": None}),
        (json.dumps({**RECORD, "since": "noon"}), drains.UNKNOWN),
        (json.dumps({**RECORD, "owner": ["x"]}), drains.UNKNOWN),
        ("", drains.UNKNOWN),
        ("[]", drains.UNKNOWN),
    ],
)
def test_of_a_drain_all_is_told_but_the_account(fleet, text, told):
    async def scenario(made, *_):
        (made.drain / "tts-gpu01-0").write_text(text)
        view = await made.agent().make_pass()
        entries = {entry["id"]: entry for entry in document(view)["instances"]}
        assert (entries["tts-gpu01-0"]["drained"], entries["tts-gpu01-0"]["drain"]) == (True, told)
        assert (entries["tts-gpu00-0"]["drained"], entries["tts-gpu00-0"]["drain"]) == (False, None)

    fleet(scenario)


def test_each_change_is_said_once_with_its_reason(fleet, caplog):
    caplog.set_level("INFO")

    async def scenario(made, guard, *_):
        agent = made.agent()
        for answer in (status_answer(), status_answer("suspect", reason="3 failures"), status_answer()):
            guard.answer = answer
            for _ in range(3):
                await agent.make_pass()

    fleet(scenario)
    assert [record.message for record in caplog.records] == [
        "tts-gpu00-0: suspect, was ready: 3 failures",
        "tts-gpu00-0: ready, was suspect",
    ]


def test_600_instances_are_asked_at_once(tmp_path):
    """One listening socket behind 600 loopback addresses; every tenth accepts and never answers."""
    listening = socket.create_server(("0.0.0.0", 0), backlog=1024)
    silent = []

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            if int(connection.getsockname()[0].split(".")[3]) % 10 == 0:
                silent.append(connection)
                continue
            with connection, contextlib.suppress(OSError):
                connection.recv(4096)
                connection.sendall(status_answer())

    threading.Thread(target=serve, daemon=True).start()
    guards = [Guard(f"127.1.{number // 200}.{number % 200 + 1}") for number in range(600)]
    for guard in guards:
        guard.port = listening.getsockname()[1]
    made = Fleet(tmp_path, guards)
    made.write()

    async def scenario():
        agent = made.agent()
        for _ in range(20):  # on a machine that gives it no CPU, silence counts only in a later pass
            await agent.make_pass()
            if made.flagged:
                break
        agent.close()

    try:
        asyncio.run(scenario())
    finally:
        listening.close()
        for connection in silent:
            connection.close()
    assert len(made.flagged) == 60


##### Telling


def view_of(states, drained=(), warning="", **changes):
    """A view of instances by id: (host, gpu, slots, state, in_flight)."""
    instances = tuple(
        Instance(name, name.split("-")[0], host, gpu, "10.0.0.1", 12321, slots)
        for name, (host, gpu, slots, _, _) in states.items()
    )
    standings = {
        name: Standing(state, "", SINCE, {} if count is None else {"in_flight": count, "served": 10}, state != READY)
        for name, (_, _, _, state, count) in states.items()
    }
    config = Config("c", 0.5, Path("/down"), Path("/drain"), Path("/audit"), Path("/sock"), instances)
    return View(config, standings, dict.fromkeys(drained, drains.UNKNOWN), warning, SINCE, 0.2)


EQUAL = {f"tts-gpu0{host}-{gpu}": (f"gpu0{host}", gpu, 2, READY, 1) for host in (1, 2, 3) for gpu in (0, 1)}


def test_the_status_of_a_healthy_cluster():
    seen = document(view_of(EQUAL))
    assert {name: value for name, value in seen.items() if name not in ("instances", "totals", "services")} == {
        "status": "healthy",
        "cluster": "c",
        "timestamp": SINCE,
        "total_capacity": 12,
        "available_capacity": 12,
        "servers": 3,
        "gpus_per_server": 2,
        "concurrent_per_gpu": 2,
        "warning": None,
        "changes": [],
    }
    assert seen["totals"] == {
        **{"status": "healthy", "instances": 6, "ready": 6, "total_capacity": 12, "available_capacity": 12},
        **{"in_flight": 6, "waiting": 0, "queue": 0, "served": 60, "refused": 0, "failed": 0},
    }
    assert seen["instances"][0] == {
        **{"id": "tts-gpu01-0", "service": "tts", "host": "gpu01", "gpu": 0, "address": "10.0.0.1", "port": 12321},
        **{"state": "ready", "reason": None, "warning": None, "since": SINCE, "started": None, "slots": 2},
        **{"in_flight": 1, "waiting": None, "queue": None, "served": 10, "refused": None, "failed": None},
        **{"version": None, "drained": False, "drain": None},
    }
    assert health(seen) == "healthy\n"


def test_unequal_servers_have_no_common_number():
    seen = document(view_of({**EQUAL, "tts-gpu04-0": ("gpu04", 0, 3, READY, 0)}))
    assert (seen["servers"], seen["gpus_per_server"], seen["concurrent_per_gpu"]) == (4, None, None)
    assert seen["total_capacity"] == 15


def test_two_services_on_the_same_cards_add_up():
    seen = document(view_of({**EQUAL, **{f"asr-{name[4:]}": entry for name, entry in EQUAL.items()}}))
    assert (seen["gpus_per_server"], seen["concurrent_per_gpu"], seen["total_capacity"]) == (2, 4, 24)
    assert {name: service["total_capacity"] for name, service in seen["services"].items()} == {"asr": 12, "tts": 12}


@pytest.mark.parametrize(
    ("state", "in_flight", "shown"),
    [
        (READY, 1, "draining"),
        (READY, 0, "drained"),
        ("stopping", 1, "draining"),
        ("stopping", 0, "stopping"),
        ("loading", 0, "loading"),
        (DOWN, None, "down"),
    ],
)
def test_a_drain_shows_as_long_as_the_guard_answers(state, in_flight, shown):
    view = view_of({**EQUAL, "tts-gpu01-0": ("gpu01", 0, 2, state, in_flight)}, drained=["tts-gpu01-0", "other"])
    seen = document(view)
    assert seen["instances"][0]["state"] == shown
    assert (seen["status"], seen["available_capacity"]) == ("degraded", 10)
    assert health(seen) == "degraded: 5 of 6 instances ready, 10 of 12 slots\n"


def test_a_cluster_is_down_when_nothing_is_ready_and_in_doubt_under_a_warning():
    down = document(view_of({name: (*entry[:3], DOWN, None) for name, entry in EQUAL.items()}))
    assert (down["status"], down["totals"]["in_flight"], down["instances"][0]["in_flight"]) == ("down", 0, None)
    doubtful = document(view_of(EQUAL, warning="more than 0.5 …"))
    assert doubtful["status"] == "degraded"
    assert health(doubtful) == "degraded: 6 of 6 instances ready, 12 of 12 slots; more than 0.5 …\n"


def test_metrics_are_prometheus_text():
    text = metrics(document(view_of({'tts-"a\\-0': ("g", 0, 2, READY, 1)})), 0.25)
    assert 'gpufleet_instance_in_flight{instance="tts-\\"a\\\\-0",service="tts",host="g"} 1\n' in text
    assert text.count(',state="') == 9
    assert "gpufleet_agent_pass_seconds 0.25\n" in text


def test_metrics_tell_what_guards_count_and_when_they_began():
    view = view_of({name: EQUAL[name] for name in ("tts-gpu01-0", "tts-gpu01-1")})
    told = replace(view.standings["tts-gpu01-0"], numbers={"in_flight": 0, "failed": 2, "started": 1767225600})
    lines = metrics(document(replace(view, standings={**view.standings, "tts-gpu01-0": told})), 0).splitlines()
    first, second = (f'instance="tts-gpu01-{gpu}",service="tts",host="gpu01"' for gpu in (0, 1))
    assert [line for line in lines if line.startswith("gpufleet_instance_start")] == [
        f"gpufleet_instance_start_time_seconds{{{first}}} 1767225600"
    ]
    assert [line for line in lines if "requests_total" in line and not line.startswith("# HELP")] == [
        "# TYPE gpufleet_instance_requests_total counter",
        f'gpufleet_instance_requests_total{{{first},outcome="failed"}} 2',
        f'gpufleet_instance_requests_total{{{second},outcome="served"}} 10',
    ]


def fetch(path, request=b"GET /health HTTP/1.0\r\n\r\n"):
    """Send bytes to a unix socket and return all that comes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
        client.sendall(request)
        received = b""
        while piece := client.recv(65536):
            received += piece
        return received


def test_the_socket_answers_everybody_on_the_host(fleet):
    async def scenario(made, *guards):
        agent = made.agent()
        await agent.make_pass()
        assert made.socket.stat().st_mode & 0o777 == 0o666
        answers = {
            path: await in_thread(fetch, made.socket, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            for path in ("/health", "/cluster/status?x=1", "/metrics", "/nope", "/")
        }
        assert [answer.split(b"\r\n")[0] for answer in answers.values()] == [
            *[b"HTTP/1.1 200 OK"] * 3,
            *[b"HTTP/1.1 404 Not Found"] * 2,
        ]
        assert answers["/health"].endswith(b"\r\n\r\nhealthy\n")
        assert json.loads(answers["/cluster/status?x=1"].partition(b"\r\n\r\n")[2])["total_capacity"] == 12
        for guard in guards:
            guard.close()
        await agent.make_pass()
        assert (await in_thread(fetch, made.socket)).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")

    fleet(scenario)


def test_a_viewer_is_told_all_and_then_after_each_pass_what_is_new(fleet):
    async def scenario(made, guard, *_):
        agent = made.agent()
        await agent.make_pass()
        reader, writer = await asyncio.open_unix_connection(str(made.socket))
        writer.write(b"GET /cluster/events HTTP/1.1\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")

        async def event():
            name, data = (await asyncio.wait_for(reader.readuntil(b"\n\n"), 2)).decode().strip().split("\n")
            return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

        name, known = await event()
        asked = await in_thread(fetch, made.socket, b"GET /cluster/status HTTP/1.0\r\n\r\n")
        assert (name, known) == ("whole", json.loads(asked.partition(b"\r\n\r\n")[2]))
        guard.answer = status_answer(in_flight=2)
        (made.drain / "tts-gpu01-0").touch()
        made.audit_log.write_text(json.dumps({**CHANGE, "by": "somebody@somewhere"}) + "\n")
        await agent.make_pass()
        name, change = await event()
        assert name == "change"
        assert [(one["id"], one["state"], one["in_flight"]) for one in change["instances"]] == [
            ("tts-gpu00-0", "ready", 2),
            ("tts-gpu01-0", "drained", 0),
        ]
        assert (change["totals"]["in_flight"], change["available_capacity"]) == (2, 10)
        assert [(one["what"], one["instance"]) for one in change["changes"]] == [("drain", "tts-gpu01-0")]
        assert "total_capacity" not in change
        await agent.make_pass()
        name, quiet = await event()
        assert name == "change" and quiet.keys() <= {"instances", "timestamp"} and quiet["instances"] == []
        made.write(only=["tts-gpu00-0"])
        await agent.make_pass()
        name, known = await event()
        assert (name, [one["id"] for one in known["instances"]]) == ("whole", ["tts-gpu00-0"])
        agent.close()
        assert await reader.read() == b"", "an agent that ends ends its streams"
        writer.close()

    fleet(scenario)


def test_an_audit_log_that_cannot_be_read_is_said_once_and_what_was_known_stays(fleet, caplog):
    caplog.set_level("INFO")

    async def scenario(made, *_):
        agent = made.agent()
        made.audit_log.write_text(json.dumps(CHANGE) + "\n")
        known = (await agent.make_pass()).changes
        made.audit_log.unlink()
        made.audit_log.mkdir()
        assert [(await agent.make_pass()).changes for _ in range(2)] == [known] * 2
        made.audit_log.rmdir()
        assert (await agent.make_pass()).changes == ()

    fleet(scenario)
    said = [record.message for record in caplog.records if record.message.startswith("audit log")]
    assert said == ["audit log: Is a directory", "audit log: all right again"]


@pytest.mark.parametrize(
    "request_bytes", [b"\r\n\r\n", b"\xff \xff\r\n\r\n", b"POST /health HTTP/1.1\r\n\r\n", b"x" * 40_000]
)
def test_who_does_not_speak_http_harms_nobody(fleet, request_bytes):
    async def scenario(made, *_):
        await made.agent().make_pass()
        with contextlib.suppress(ConnectionError):
            assert b"200" not in await in_thread(fetch, made.socket, request_bytes)
        assert b"200" in await in_thread(fetch, made.socket)

    fleet(scenario)


def test_a_dead_agents_socket_is_replaced_and_a_lost_one_made_again(tmp_path):
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def scenario():
        server = StatusServer(path, {"/health": lambda: Reply(200, "text/plain", "well\n")}, {})
        await server.ensure()
        assert (await in_thread(fetch, path)).endswith(b"well\n")
        kept = path.stat().st_ino
        await server.ensure()
        assert path.stat().st_ino == kept
        path.unlink()
        await server.ensure()
        assert (await in_thread(fetch, path)).endswith(b"well\n")
        server.close()

    asyncio.run(scenario())


def test_the_program_says_what_is_wrong_with_its_configuration(tmp_path):
    config = tmp_path / "agent.json"
    command = [sys.executable, "-m", "fleet_agent", "--config", str(config)]
    run = subprocess.run(command, cwd=PROJECT / "service/agent", capture_output=True, text=True, env={**os.environ})
    assert run.returncode == 2
    assert "No such file or directory" in run.stderr
    config.write_text("{}")
    run = subprocess.run(command, cwd=PROJECT / "service/agent", capture_output=True, text=True)
    assert run.returncode == 2
    assert "not a configuration of the agent: KeyError: 'instances'" in run.stderr

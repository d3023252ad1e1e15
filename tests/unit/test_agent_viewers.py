"""Who watches the cluster, and what they are told: as many as there may be, slow ones, and no more than is for all."""

import asyncio
import contextlib
import json
import time
from pathlib import Path

import pytest
from fleet_agent import status, viewers
from fleet_agent.audit import MOST, TAIL, AuditLog, last_changes
from fleet_agent.config import Config, Instance
from fleet_agent.decision import READY, Standing
from fleet_agent.edition import Edition
from fleet_agent.server import StatusServer
from fleet_agent.status import View, difference, document
from fleet_agent.viewers import Viewers
from hypothesis import given
from hypothesis import strategies as st

SINCE = "2026-01-01T00:00:00+00:00"
ASK = b"GET /cluster/events HTTP/1.1\r\n\r\n"


def view(counts, reason=""):
    """A view of instances by id: requests in flight, None for one that is down."""
    instances = tuple(Instance(name, "tts", name, 0, "10.0.0.1", 12321, 2) for name in counts)
    standings = {
        name: Standing("down" if count is None else READY, reason, SINCE, {"in_flight": count or 0}, count is None)
        for name, count in counts.items()
    }
    config = Config("c", 0.5, Path("/down"), Path("/drain"), Path("/audit"), Path("/sock"), instances)
    return View(config, standings, {}, "", SINCE, 0.2)


class Stage:
    """A server on a unix socket that streams what is told."""

    def __init__(self, folder, first):
        self.path = folder / "http.sock"
        self.edition = Edition(first)
        self.viewers = Viewers(self.edition)
        self._server = StatusServer(self.path, {}, {"/cluster/events": self.viewers})
        self._watching = []

    async def __aenter__(self):
        await self._server.ensure()
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in self._watching:
            writer.transport.abort()
        await until(lambda: len(self.viewers) == 0)

    async def watch(self):
        """Ask for the stream; return its reader and writer."""
        reader, writer = await asyncio.open_unix_connection(str(self.path), limit=1 << 24)
        writer.write(ASK)
        self._watching.append(writer)
        return reader, writer

    def tell(self, view):
        """What the agent does after a pass."""
        self.edition = Edition(view, before=self.edition.document if self.viewers else None)
        self.viewers.tell(self.edition)


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("waited in vain")


async def event(reader):
    """Name and document of the next event; the head of the answer is skipped."""
    text = (await asyncio.wait_for(reader.readuntil(b"\n\n"), 5)).decode()
    name, data = text[text.index("event: ") :].strip().split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_many_watch_and_each_document_is_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(status, "document", lambda view: made.append(view) or document(view))
    monkeypatch.setattr(viewers, "MOST", 50)
    counts = {f"gpu{number:03}": 0 for number in range(600)}

    async def scenario():
        async with Stage(tmp_path, view(counts)) as stage:
            watching = [await stage.watch() for _ in range(50)]
            firsts = await asyncio.gather(*(event(reader) for reader, _ in watching))
            assert {name for name, _ in firsts} == {"whole"} and len(firsts[0][1]["instances"]) == 600
            began = time.process_time()
            for number in range(1, 6):
                stage.tell(view({**counts, "gpu007": number}))
            spent = time.process_time() - began
            for number in range(1, 6):
                told = await asyncio.gather(*(event(reader) for reader, _ in watching))
                assert all(name == "change" and len(change["instances"]) == 1 for name, change in told)
                assert told[0][1]["instances"][0]["in_flight"] == number
            # The one more than may watch is told so, and none of the others is harmed.
            reader, _ = await stage.watch()
            assert (await reader.read()).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert len(stage.viewers) == 50
            watching.pop()[1].close()
            await until(lambda: len(stage.viewers) == 49)
            reader, _ = await stage.watch()
            assert (await event(reader))[0] == "whole"
            return spent

    spent = asyncio.run(scenario())
    assert len(made) == 6, "once for the first, and once for each that was told"
    assert spent / 5 < 0.2, "of the second that a pass has"


def test_who_is_slow_misses_events_and_is_told_all_when_it_is_back(tmp_path):
    counts = {f"gpu{number:03}": 0 for number in range(3)}

    async def scenario():
        async with Stage(tmp_path, view(counts)) as stage:
            reader, writer = await stage.watch()
            await event(reader)
            writer.transport.pause_reading()
            (inside,) = stage.viewers._missed
            stage.tell(view(counts, reason="x" * 4_000_000))  # more than the kernel holds for it
            for number in range(5):
                stage.tell(view({**counts, "gpu001": number}))
            held = inside.transport.get_write_buffer_size()
            assert 0 < held < 13_000_000, "one document, and not one for each event"
            writer.transport.resume_reading()
            assert (await event(reader))[0] == "change"
            await until(lambda: inside.transport.get_write_buffer_size() == 0)
            stage.tell(view({**counts, "gpu002": 2}))
            name, known = await event(reader)
            assert (name, [one["in_flight"] for one in known["instances"]]) == ("whole", [0, 0, 2])

    asyncio.run(scenario())


def test_who_takes_nothing_is_dropped(tmp_path):
    async def scenario():
        async with Stage(tmp_path, view({"gpu01": 0}, reason="x" * 4_000_000)) as stage:
            _, writer = await stage.watch()
            writer.transport.pause_reading()
            await until(lambda: len(stage.viewers) == 1)
            for _ in range(viewers.PATIENCE):
                stage.tell(view({"gpu01": 1}))
                await asyncio.sleep(0)
            assert len(stage.viewers) == 1
            stage.tell(view({"gpu01": 1}))
            await until(lambda: len(stage.viewers) == 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("last_words", [b"", b"x"], ids=["leaves", "says more"])
def test_who_leaves_is_forgotten_at_once(tmp_path, last_words):
    async def scenario():
        async with Stage(tmp_path, view({"gpu01": 0})) as stage:
            reader, writer = await stage.watch()
            await event(reader)
            writer.write(last_words)
            writer.write_eof()
            await until(lambda: len(stage.viewers) == 0)
            stage.tell(view({"gpu01": 1}))
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""

    asyncio.run(scenario())


def test_a_stream_ends_after_a_while_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(viewers, "STREAM_SECONDS", 0.3)

    async def scenario():
        async with Stage(tmp_path, view({"gpu01": 0})) as stage:
            reader, _ = await stage.watch()
            await event(reader)
            stage.tell(view({"gpu01": 1}))
            assert (await reader.read()).endswith(b"\n\n")
            assert len(stage.viewers) == 0

    asyncio.run(scenario())


COUNTS = st.dictionaries(
    st.sampled_from(["gpu01", "gpu02", "gpu03"]), st.one_of(st.none(), st.integers(0, 2)), min_size=1
)


@given(st.lists(COUNTS, min_size=1, max_size=6))
def test_who_is_told_what_is_new_knows_all(steps):
    """As the page does it: fields written over, instances replaced by their ids."""
    known = None
    before = None
    for step in steps:
        now = document(view(step))
        change = difference(before, now) if before else None
        if change is None:
            known = now
        else:
            new = {one["id"]: one for one in change["instances"]}
            known = {**known, **change, "instances": [new.get(one["id"], one) for one in known["instances"]]}
        assert known == now
        before = now


##### What was changed last


def lines(*records):
    return [json.dumps(record).encode() for record in records]


DRAIN = {"what": "drain", "instance": "tts-gpu01-0", "from": "serving", "to": "drained", "reason": "Bob's fan"}
RECORD = {"time": SINCE, "by": "alice@desk", **DRAIN, "result": "ok"}
TOLD = {"time": SINCE, "what": "drain", "instance": "tts-gpu01-0", "from": "serving", "to": "drained", "ok": True}


def test_neither_who_nor_why_is_told():
    assert last_changes(lines(RECORD)) == (TOLD,)
    failed = {**RECORD, "what": "rollout", "from": "f00d", "to": None, "result": "failed: /opt/x: token=secret"}
    assert last_changes(lines(failed)) == ({**TOLD, "what": "rollout", "from": "f00d", "to": None, "ok": False},)


@pytest.mark.parametrize(
    "record",
    [
        {"time": SINCE, "by": "a@b", "what": "lock taken over", "from": "alice@desk is changing …", "to": "site.yml"},
        {**RECORD, "instance": "alice@desk"},
        {**RECORD, "what": ["drain"]},
        {**RECORD, "time": None},
        [RECORD],
        "drain",
    ],
)
def test_what_is_not_of_an_instance_or_not_plain_is_not_told(record):
    assert last_changes(lines(record, RECORD)) == (TOLD,)


@pytest.mark.parametrize("field", ["from", "to"])
@pytest.mark.parametrize("value", ["alice@desk", "/etc/shadow", "a\nb", '"', "x" * 200, {"a": 1}, 7])
def test_a_field_that_is_not_plain_is_left_out(field, value):
    assert last_changes(lines({**RECORD, field: value})) == ({**TOLD, field: None},)


def test_the_newest_are_first_and_they_are_few():
    many = [{**RECORD, "instance": f"tts-gpu01-{number}"} for number in range(MOST + 5)]
    told = last_changes([*lines(*many), b"", b'{"time": "20', b"\xff"])
    assert [change["instance"] for change in told] == [f"tts-gpu01-{number}" for number in range(MOST + 4, 4, -1)]


def test_the_end_of_a_long_log_is_read_and_only_when_it_has_grown(tmp_path, monkeypatch):
    path, log = tmp_path / "audit.log", AuditLog()
    assert log.read(path) == ()
    path.write_bytes(b"x" * TAIL + b"\n" + lines({**RECORD, "instance": "tts-gpu02-0"})[0] + b"\n")
    (change,) = log.read(path)
    assert change["instance"] == "tts-gpu02-0"
    monkeypatch.setattr(Path, "open", None)
    assert log.read(path) == (change,)
    monkeypatch.undo()
    with path.open("ab") as file:
        file.write(lines(RECORD)[0] + b"\n")
    assert [change["instance"] for change in log.read(path)] == ["tts-gpu01-0", "tts-gpu02-0"]

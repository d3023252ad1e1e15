"""An instance that has worn out: when, how it leaves, and that nothing counts as a failure."""

import json
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slot_guard import Settings, recycling
from slot_guard.recycling import SPREAD, Wear, resident_megabytes

from tests.unit.service_helpers import FROM_GATEWAY, serving, wait_for

COUNTS = st.one_of(st.none(), st.integers(1, 10**6))


@given(COUNTS, COUNTS, COUNTS, st.text(max_size=9))
def test_every_instance_has_its_own_point_in_the_last_tenth(megabytes, requests, seconds, name):
    limits = Wear(megabytes, requests, seconds)
    own = limits.for_instance(name)
    assert own == limits.for_instance(name)
    for least, mine, given_limit in zip((1 - SPREAD,) * 3, vars(own).values(), vars(limits).values(), strict=True):
        assert mine is given_limit is None or least * given_limit <= mine <= given_limit


def test_the_instances_of_a_fleet_are_spread():
    ends = sorted(Wear(seconds=86400).for_instance(f"tts-gpu{n:02}-{m}").seconds for n in range(10) for m in (0, 1))
    assert all(ends[i] < ends[i + 3] - 60 for i in range(17)), "no more than three of twenty in a minute"


@pytest.mark.parametrize(
    ("limits", "now", "said"),
    [
        (Wear(), Wear(1e9, 1e9, 1e9), ""),
        (Wear(100, 100, 100), Wear(99, 99, 99), ""),
        (Wear(megabytes=100), Wear(100, 0, 0), "uses 100 MB of memory, its limit is 100"),
        (Wear(requests=5), Wear(0, 5, 0), "has worked on 5 requests, its limit is 5"),
        (Wear(seconds=60), Wear(0, 0, 61), "has served for 61 s, its limit is 60"),
        (Wear(requests=0.9), Wear(9, 0, 9), ""),
    ],
)
def test_which_limit_is_reached(limits, now, said):
    assert limits.reached(now) == said


def test_memory_is_that_of_the_process_and_its_children():
    before = resident_megabytes()
    held = bytearray(64 << 20)
    assert 50 < resident_megabytes() - before < 80
    del held
    source = "import sys; held = bytearray(64 << 20); print('held', flush=True); sys.stdin.read()"
    before = resident_megabytes()
    child = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert 60 < resident_megabytes() - before < 110
    finally:
        child.communicate()
    assert resident_megabytes() - before < 20


@pytest.mark.parametrize("variable", ["MEMORY_MEGABYTES", "RECYCLE_REQUESTS", "RECYCLE_SECONDS"])
def test_settings_are_refused_by_name(variable):
    assert Settings.from_environment({"SLOT_GUARD_APP": "a:b"}).limits == Wear()
    with pytest.raises(ValueError, match=f"SLOT_GUARD_{variable} is '0'"):
        Settings.from_environment({"SLOT_GUARD_APP": "a:b", f"SLOT_GUARD_{variable}": "0"})


def test_supervisor_believes_in_a_start_before_an_instance_is_worn_out():
    assert recycling.LEAST_SECONDS > 2 * 10  # its startsecs; a sooner end would count as a failed start


##### Under Gunicorn


def recycled(tmp_path, seconds="0", **limits):
    environment = {f"SLOT_GUARD_{name}": str(limit) for name, limit in limits.items()}
    return serving(tmp_path, "leaky:app", WORK_SECONDS=seconds, SLOT_GUARD_INSTANCE="gpu-0", **environment)


def assert_left_without_a_failure(server, tmp_path):
    assert server.process.wait(15) == 3, "which has Supervisor start it anew"
    assert not list(tmp_path.glob("*.trip.json"))
    assert "leaky:app is suspect" not in server.log


def test_a_leak_ends_in_a_drain_and_an_exit_and_cuts_no_request(tmp_path):
    with recycled(tmp_path, MEMORY_MEGABYTES=160) as server:
        for _ in range(40):
            if server.post("/")[0] != 200:
                break
            time.sleep(0.06)
        status = server.status()
        assert (status["state"], status["failed"], status["trips"]) == ("recycling", 0, 0)
        assert status["reason"].startswith("uses 1") and "MB of memory, its limit is 1" in status["reason"]
        answer = server.ask("POST", "/", headers=FROM_GATEWAY)
        assert (answer[0], answer[1]["X-Slot-Guard"]) == (429, "recycling")
        assert json.loads(answer[2])["error"]["type"] == "not_admitted"
        assert_left_without_a_failure(server, tmp_path)


def test_work_is_finished_first_and_who_waits_goes_elsewhere(tmp_path):
    with recycled(tmp_path, "1", RECYCLE_REQUESTS=1, SLOTS=2, QUEUE=1) as server:
        first = server.begin("/")
        wait_for(lambda: server.in_flight() == 1)
        time.sleep(0.4)
        second = server.begin("/")
        wait_for(lambda: server.in_flight() == 2)
        place = server.send(
            b"GET /_slot_guard/slot HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\r\nConnection: close\r\n\r\n"
        )
        assert first.recv(12) == b"HTTP/1.1 200"
        wait_for(lambda: server.status()["state"] == "recycling", 0.5)
        assert server.ask("GET", "/_slot_guard/ready")[0] == 503
        metrics = server.ask("GET", "/_slot_guard/metrics")[2]
        assert b'slot_guard_recycling{instance="gpu-0",version=""} 1\n' in metrics
        assert b'slot_guard_ready{instance="gpu-0",version=""} 0\n' in metrics
        assert second.recv(12) == b"HTTP/1.1 200"
        assert place.recv(12) in {b"HTTP/1.1 200", b"HTTP/1.1 403"}  # its turn may have come in the meantime
        refused = server.ask("POST", "/", headers={"X-Request-ID": "a", **FROM_GATEWAY})
        assert (refused[0], refused[1]["X-Slot-Guard"]) == (429, "recycling")
        assert_left_without_a_failure(server, tmp_path)


def test_an_instance_that_begins_over_its_memory_limit_serves_on_and_says_so(tmp_path):
    with recycled(tmp_path, MEMORY_MEGABYTES=5) as server:
        for _ in range(4):
            assert server.post("/")[0] == 200
            time.sleep(0.1)
        status = server.status()
        assert (status["state"], status["reason"]) == ("ready", None)
        assert "though nothing was done yet: it is not recycled for its memory" in status["warning"]

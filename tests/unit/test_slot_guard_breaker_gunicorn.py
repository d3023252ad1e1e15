"""A GPU that fails every request at once, under the real Supervisor and Gunicorn."""

import json
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.service_helpers import FROM_GATEWAY, PROJECT, UNIT, Server, serving, wait_for

SMOKE = {"method": "POST", "path": "/speak", "headers": {"content-type": "application/json"}, "body": '{"text": "好"}'}


@pytest.fixture
def supervised(tmp_path):
    """The moody app as Supervisor's program on this host: (server, folder)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "mood").write_text("good")
    (tmp_path / "calls").touch()
    environment = {
        "PYTHONPATH": f"{PROJECT / 'service/guard'}:{UNIT / 'fixtures'}",
        "SLOT_GUARD_APP": "moody:app",
        "SLOT_GUARD_INSTANCE": "moody-gpu01-0",
        "SLOT_GUARD_SMOKE": json.dumps(SMOKE),
        "SLOT_GUARD_STATE": tmp_path,
        "MOOD": tmp_path / "mood",
        "CALLS": tmp_path / "calls",
    }
    command = [sys.executable, "-m", "gunicorn", "--worker-class", "asgi", "--workers", "1"]
    command += ["--bind", f"127.0.0.1:{port}", "--no-control-socket", "--graceful-timeout", "5", "slot_guard.asgi:app"]
    (tmp_path / "supervisord.conf").write_text(
        f"[supervisord]\nnodaemon = true\nuser = root\nlogfile = {tmp_path}/supervisord.log\n"
        f"pidfile = {tmp_path}/supervisord.pid\n[program:moody]\ncommand = {shlex.join(command)}\n"
        "startsecs = 10\nstartretries = 30\nautorestart = true\nredirect_stderr = true\nkillasgroup = true\n"
        f"stdout_logfile = {tmp_path}/moody.log\n"
        f"environment = {','.join(f'{name}={chr(39)}{value}{chr(39)}' for name, value in environment.items())}\n"
    )
    supervisord = Path(sys.executable).with_name("supervisord")
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen([supervisord, "-c", tmp_path / "supervisord.conf"], stdout=output, stderr=output)
    server = Server(process, port, tmp_path / "moody.log")
    try:
        wait_for(server.is_ready)
        yield server, tmp_path
    finally:
        process.terminate()
        process.wait(20)


def state(server):
    """(state, trips), or None while nothing listens."""
    try:
        status = server.status()
    except OSError:
        return None
    return status["state"], status["trips"]


def calls(folder):
    """The request id of every call of the app; a client that gives none is a dash."""
    return (folder / "calls").read_text().split()


def test_a_sink_is_out_after_three_requests_and_back_when_it_is_good_again(supervised):
    server, folder = supervised
    assert calls(folder) == ["smoke"]
    for path in ("/poison", "/poison", "/speak") * 3:
        assert server.post(path)[0] == (500 if path == "/poison" else 200)
    (folder / "mood").write_text("bad")
    known, begun, seen = len(calls(folder)), time.monotonic(), []
    while 429 not in seen:
        seen.append(server.ask("POST", "/speak", headers=FROM_GATEWAY)[0])
    assert seen == [500, 500, 500, 429]
    assert time.monotonic() - begun < 2
    reason = server.status()["reason"]
    assert reason == "3 failed in a row, the last /speak with status 500"

    # The next process waits 5 s, tells why, finds its smoke request failing and goes; the one after it waits 10 s.
    # Asked of the log: on a busy machine little of the 5 s is left once it has started.
    wait_for(lambda: f"taken out 1 times in a row ({reason}): waiting" in server.log, 15)
    wait_for(lambda: state(server) == ("suspect", 2), 15)
    assert time.monotonic() - begun > 4.9
    assert calls(folder)[known:] == ["-", "-", "-", "smoke"]
    (folder / "mood").write_text("good")
    wait_for(lambda: state(server) == ("ready", 0), 30)
    assert 14.9 < time.monotonic() - begun < 30
    assert calls(folder)[known:] == ["-", "-", "-", "smoke", "smoke"]
    assert server.post("/speak")[0] == 200
    assert not list(folder.glob("*.trip.json*"))


def test_gunicorn_ends_with_the_guards_exit_code_and_its_clients_have_their_answers(tmp_path):
    (tmp_path / "mood").write_text("bad")
    environment = {"MOOD": str(tmp_path / "mood"), "CALLS": str(tmp_path / "calls"), "SLOT_GUARD_FAILURES": "1"}
    with serving(tmp_path, "moody:app", **environment) as server:
        assert server.post("/speak")[0] == 500
        begun, refused = time.monotonic(), 0
        while server.process.poll() is None and time.monotonic() - begun < 1.8:
            assert server.post("/speak")[0] == 429
            refused += 1
        assert refused > 50
        assert server.process.wait(10) == 3
    assert (tmp_path / "slot_guard.trip.json").exists()


def test_a_stream_tells_nginx_not_to_hold_it_back(tmp_path):
    with serving(tmp_path, "kinds:app", WORK_LEDGER=str(tmp_path / "ledger"), WORK_SECONDS="0.1") as server:
        assert server.post("/stream")[1]["X-Accel-Buffering"] == "no"
        assert server.post("/quick")[1]["X-Accel-Buffering"] is None

"""An engine that is absent, present, killed or refused. dockerd and its client are stood in for by short scripts:
what is tested is which processes are started, remembered and ended."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from testbed.engine import Engine, EngineFailed

CLIENT = """#!/bin/sh
case "$*" in
    *info*) test -e {answering} && echo 20.10.24 ;;
    *ps*) cat {containers} ;;
esac
"""
DAEMON = """#!/bin/bash
{start}
touch {answering}
trap 'rm {answering}; exit' TERM
while :; do sleep 0.05; done
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = {"answering": tmp_path / "answering", "containers": tmp_path / "containers", "start": ""}
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("docker", CLIENT), ("dockerd", DAEMON), ("iptables", "#!/bin/sh\n")):
        (programs / name).write_text(text.format(**places))
        (programs / name).chmod(0o755)
    places["containers"].touch()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    engine = Engine(address=f"unix://{tmp_path}/socket", state=tmp_path / "state", runtime=tmp_path / "run")
    yield engine
    engine.stop()


def test_starts_where_none_answers_and_ends_what_it_started(engine: Engine) -> None:
    assert not engine.answers()
    assert engine.start()
    assert engine.answers()
    pid = engine.started_here()
    assert os.getsid(pid) == pid, "an interrupt at the terminal would end the engine too"
    assert engine.stop()
    assert not engine.answers()
    assert not engine.stop()


def test_leaves_an_engine_alone_that_somebody_else_started(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "answering").touch()
    assert not engine.start()
    assert engine.started_here() is None
    assert not engine.stop()
    assert engine.answers()


def test_a_second_start_keeps_the_first_ones_mark(engine: Engine) -> None:
    engine.start()
    pid = engine.started_here()
    assert not engine.start()
    assert engine.started_here() == pid


def test_a_killed_engine_is_started_anew(engine: Engine, tmp_path: Path) -> None:
    engine.start()
    pid = engine.started_here()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    (tmp_path / "answering").unlink()
    assert engine.started_here() is None
    assert engine.start()


def test_a_process_that_got_the_number_of_a_killed_engine_is_not_ended(engine: Engine, tmp_path: Path) -> None:
    engine.start()
    pid = engine.started_here()
    time.sleep(0.05)  # start times are told in hundredths of a second
    mark = tmp_path / "state" / "started.json"
    text = mark.read_text()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        mark.write_text(text.replace(str(pid), str(stranger.pid), 1))
        stopped, alive = engine.stop(), stranger.poll() is None
        stranger.kill()
    mark.write_text(text)
    assert (stopped, alive) == (False, True)


@pytest.mark.parametrize("file", ["state/dockerd.pid", "run/containerd/containerd.pid"])
def test_pid_files_of_a_killed_engine_do_not_stop_a_new_one(engine: Engine, tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(str(os.getpid()))
    engine.start()
    assert not (tmp_path / file).exists()


def test_an_engine_that_ends_at_once_says_why(engine: Engine, tmp_path: Path) -> None:
    daemon = tmp_path / "bin" / "dockerd"
    daemon.write_text("#!/bin/sh\necho no space left on device; exit 1\n")
    began = time.monotonic()
    with pytest.raises(EngineFailed, match="no space left on device"):
        engine.start()
    assert time.monotonic() - began < 10
    assert engine.started_here() is None


def test_only_a_unix_socket_is_ours_to_listen_on(tmp_path: Path, engine: Engine) -> None:
    with pytest.raises(EngineFailed, match="DOCKER_HOST=tcp://"):
        Engine(address="tcp://127.0.0.1:1", state=tmp_path / "state").start()


def test_is_idle_only_without_containers(engine: Engine, tmp_path: Path) -> None:
    assert engine.idle()
    (tmp_path / "containers").write_text("0123456789ab\n")
    assert not engine.idle()

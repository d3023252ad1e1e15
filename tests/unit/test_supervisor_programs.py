# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""The module supervisor_programs against a real supervisord on a socket of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import ProgramFile, parse_programs
from ansible_collections.gpufleet.core.plugins.modules import supervisor_programs
from ansible_collections.gpufleet.core.plugins.modules.supervisor_programs import (
    Host,
    Plan,
    Process,
    Readiness,
    Supervisor,
    converge,
    group_members,
    trouble,
)

from tests.unit.service_helpers import free_port

SLEEP = "/bin/sleep 1000"

#: Answers 503 with the given state, and 200 from the third request on if the state is `loading`.
SERVER = """
import http.server, sys
asked = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        ready = sys.argv[2] == "loading" and asked >= 3
        self.send_response(200 if ready else 503)
        self.end_headers()
        self.wfile.write(b'{"state": "%s"}' % (b"ready" if ready else sys.argv[2].encode()))
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

#: A master that leaves at SIGTERM and a worker of its process group that does not.
CARELESS = """
import os, signal, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(1000)
"""


class Bench:
    """A supervisord, the file of our programs beside somebody else's, and the module to call."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys
        self.socket = root / "s.sock"
        self.file = root / "conf.d" / "gpufleet.conf"
        self.foreign_file = root / "conf.d" / "other.conf"
        self.configuration = root / "supervisord.conf"
        self.file.parent.mkdir()
        self.foreign_file.write_text(f"[program:other]\ncommand = {SLEEP}\nstartsecs = 0\n")
        self.configuration.write_text(
            f"[unix_http_server]\nfile = {self.socket}\n"
            f"[supervisord]\nlogfile = {root}/supervisord.log\npidfile = {root}/supervisord.pid\n"
            f"childlogdir = {root}\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n"
            "[include]\nfiles = conf.d/*.conf\n"
        )

    @property
    def supervisord(self) -> list[str]:
        return [sys.executable, "-W", "ignore", "-m", "supervisor.supervisord", "-c", str(self.configuration)]

    def script(self, name: str, text: str, *arguments: object) -> str:
        """Write a Python script and return the command that runs it."""
        path = self.root / f"{name}.py"
        path.write_text(text)
        return " ".join([sys.executable, str(path), *map(str, arguments)])

    def program(self, index: int, command: str = SLEEP, startsecs: int = 0, **options: object) -> str:
        name = f"gpufleet-a-{index}"
        lines = {
            "command": command,
            "startsecs": startsecs,
            "stopwaitsecs": 5,
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": f"{self.root}/log/{name}.log",
            **options,
        }
        return f"[program:{name}]\n" + "".join(f"{option} = {value}\n" for option, value in lines.items()) + "\n"

    def run(self, *programs: str, check: bool = False, diff: bool = False, **options: object) -> dict[str, Any]:
        """Call the module; the result has ``failed`` where it failed."""
        arguments = {
            "path": str(self.file),
            "content": "# ours\n" + "".join(programs),
            "socket": str(self.socket),
            **options,
            "_ansible_check_mode": check,
            "_ansible_diff": diff,
        }
        self.capsys.readouterr()
        with patch_module_args(arguments), contextlib.suppress(SystemExit):
            supervisor_programs.main()
        result: dict[str, Any] = json.loads(self.capsys.readouterr().out)
        return result

    def pids(self) -> dict[str, int]:
        """Return the pid of every program, somebody else's included."""
        return {name: process.pid for name, process in Supervisor(str(self.socket), "").processes().items()}

    def order(self, method: str, *arguments: object) -> None:
        """Do what an operator does with supervisorctl."""
        getattr(Supervisor(str(self.socket), ""), method)(*arguments)

    def wait(self, name: str, state: str) -> None:
        until = time.monotonic() + 10
        while Supervisor(str(self.socket), "").processes()[name].state != state:
            assert time.monotonic() < until
            time.sleep(0.05)

    def end(self) -> None:
        """End supervisord and its programs at once; an orderly shutdown takes it a second for each of them."""
        groups = [pid for pid in self.pids().values() if pid]
        os.kill(int((self.root / "supervisord.pid").read_text()), signal.SIGKILL)
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


@pytest.fixture
def bare(capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    """A host where Supervisor is configured but does not run; its path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="sv") as root:
        yield Bench(Path(root), capsys)


@pytest.fixture
def bench(bare: Bench) -> Iterator[Bench]:
    with subprocess.Popen([*bare.supervisord, "-n"], stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 10
            while not Supervisor(str(bare.socket), "").answers():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
            yield bare
            bare.end()
        finally:
            process.kill()


def test_first_run_starts_all_and_the_second_changes_nothing(bench: Bench) -> None:
    programs = [bench.program(0, startsecs=1), bench.program(1, startsecs=1)]
    first = bench.run(*programs)
    assert first["changed"]
    assert first["added"] == ["gpufleet-a-0", "gpufleet-a-1"]
    assert {name: program["state"] for name, program in first["programs"].items()} == {
        "gpufleet-a-0": "RUNNING",
        "gpufleet-a-1": "RUNNING",
    }
    assert stat.S_IMODE(bench.file.stat().st_mode) == 0o600
    assert stat.S_IMODE((bench.root / "log").stat().st_mode) == 0o750
    assert [path.name for path in bench.file.parent.iterdir() if path != bench.foreign_file] == ["gpufleet.conf"]
    pids = bench.pids()
    second = bench.run(*programs)
    assert not second["changed"]
    assert bench.pids() == pids


def test_a_file_that_others_can_read_is_closed_and_nothing_restarts(bench: Bench) -> None:
    bench.run(bench.program(0))
    pids = bench.pids()
    bench.file.chmod(0o644)
    assert bench.run(bench.program(0))["changed"]
    assert stat.S_IMODE(bench.file.stat().st_mode) == 0o600
    written = bench.file.stat().st_mtime_ns
    assert not bench.run(bench.program(0))["changed"]
    assert (bench.pids(), bench.file.stat().st_mtime_ns) == (pids, written)


def test_added_changed_and_removed_programs_leave_the_others_alone(bench: Bench) -> None:
    bench.run(bench.program(0), bench.program(1), bench.program(2))
    before = bench.pids()
    bench.foreign_file.write_text(bench.foreign_file.read_text() + "priority = 1\n")  # somebody's pending change
    result = bench.run(bench.program(0), bench.program(1, priority=5), bench.program(3))
    after = bench.pids()
    assert (result["added"], result["restarted"], result["removed"]) == (
        ["gpufleet-a-3"],
        ["gpufleet-a-1"],
        ["gpufleet-a-2"],
    )
    assert set(after) == {"other", "gpufleet-a-0", "gpufleet-a-1", "gpufleet-a-3"}
    assert {name for name in before if before[name] == after.get(name)} == {"other", "gpufleet-a-0"}
    assert group_members(before["gpufleet-a-1"]) == group_members(before["gpufleet-a-2"]) == []


def test_an_empty_list_of_programs_removes_all(bench: Bench) -> None:
    bench.run(bench.program(0))
    assert bench.run()["removed"] == ["gpufleet-a-0"]
    assert list(bench.pids()) == ["other"]


def test_programs_of_one_change_stop_at_a_time(bench: Bench) -> None:
    slow = bench.script(
        "slow", "import signal, time\nsignal.signal(15, lambda *_: (time.sleep(1), exit()))\nsignal.pause()"
    )
    bench.run(*(bench.program(index, slow, startsecs=1) for index in range(4)))
    begun = time.monotonic()
    bench.run()
    assert time.monotonic() - begun < 3


def test_what_a_stopped_program_leaves_behind_is_killed(bench: Bench) -> None:
    bench.run(bench.program(0, bench.script("careless", CARELESS), startsecs=1))
    group = bench.pids()["gpufleet-a-0"]
    assert len(group_members(group)) == 2
    present = parse_programs(bench.file.read_text(), "gpufleet-")
    warnings: list[str] = []
    host = Host(bench.file, Supervisor(str(bench.socket), "gpufleet-"), Readiness({}), warnings.append)
    assert converge(host, Plan(ProgramFile("", {}), present))["removed"] == ["gpufleet-a-0"]
    assert group_members(group) == []
    (warning,) = warnings
    assert warning.startswith("gpufleet-a-0 had left processes behind, which were killed: [")


def test_a_program_that_breaks_is_put_back_and_the_others_stay_as_wanted(bench: Bench) -> None:
    bench.run(bench.program(0), bench.program(1), bench.program(2))
    before = bench.pids()
    broken = bench.script("broken", "raise SystemExit('no such model')")
    result = bench.run(
        bench.program(0, broken, startsecs=1),
        bench.program(1, priority=5),
        bench.program(2),
        bench.program(3, broken, 1),
    )
    assert result["failed"]
    first, second = result["msg"].split("gpufleet-a-3: ")
    assert first.startswith("gpufleet-a-0: Put back on its previous settings, it runs. It failed: BACKOFF: Exited too")
    assert second.startswith("New, so taken out again. It failed: BACKOFF")
    assert f"Last lines of {bench.root}/log/gpufleet-a-0.log:\n  no such model" in first
    assert bench.file.read_text() == "# ours\n" + bench.program(0) + bench.program(1, priority=5) + bench.program(2)
    after = bench.pids()
    assert set(after) == set(before)
    assert after["gpufleet-a-2"] == before["gpufleet-a-2"]
    assert not bench.run(bench.program(0), bench.program(1, priority=5), bench.program(2))["changed"]


def test_a_file_that_supervisord_refuses_changes_nothing(bench: Bench) -> None:
    bench.run(bench.program(0))
    before = bench.pids()
    result = bench.run(bench.program(0), bench.program(1, user="nobody_by_this_name"))
    assert "Supervisor refuses its configuration" in result["msg"]
    assert "nobody_by_this_name" in result["msg"]
    assert bench.file.read_text() == "# ours\n" + bench.program(0)
    assert bench.pids() == before


def test_a_refused_first_file_is_taken_away(bench: Bench) -> None:
    assert bench.run(bench.program(0, user="nobody_by_this_name"))["failed"]
    assert not bench.file.exists()


@pytest.mark.parametrize("content", ["[program:other]\ncommand = x\n", "command = x\n"])
def test_content_that_is_no_file_of_our_programs_is_refused_before_anything_is_done(bare: Bench, content: str) -> None:
    assert bare.run(content)["msg"].startswith("content: ")
    assert not bare.file.exists()


def test_stopped_programs_are_started_again(bench: Bench) -> None:
    crashing = bench.script("crash", f"import os, time\nos.path.exists('{bench.root}/ok') or exit(1)\ntime.sleep(1000)")
    (bench.root / "ok").touch()
    programs = [bench.program(0), bench.program(1, crashing, startsecs=1, startretries=0), bench.program(2)]
    bench.run(*programs)
    (bench.root / "ok").unlink()
    os.kill(bench.pids()["gpufleet-a-1"], signal.SIGKILL)
    bench.order("stop", "gpufleet-a-0")
    bench.wait("gpufleet-a-0", "STOPPED")
    bench.wait("gpufleet-a-1", "FATAL")
    (bench.root / "ok").touch()
    untouched = bench.pids()["gpufleet-a-2"]
    predicted = bench.run(*programs, check=True)
    assert predicted["started"] == ["gpufleet-a-0", "gpufleet-a-1"]
    assert bench.pids()["gpufleet-a-0"] == 0
    result = bench.run(*programs)
    assert result["changed"]
    assert result["started"] == ["gpufleet-a-0", "gpufleet-a-1"]
    assert all(program["state"] == "RUNNING" for program in result["programs"].values())
    assert bench.pids()["gpufleet-a-2"] == untouched


def test_an_unchanged_program_that_cannot_run_fails_and_stays(bench: Bench) -> None:
    crashing = bench.script("crash", f"import os, time\nos.path.exists('{bench.root}/ok') or exit(1)\ntime.sleep(1000)")
    (bench.root / "ok").touch()
    program = bench.program(0, crashing, startsecs=1)
    bench.run(program)
    (bench.root / "ok").unlink()
    os.kill(bench.pids()["gpufleet-a-0"], signal.SIGKILL)
    bench.wait("gpufleet-a-0", "BACKOFF")
    result = bench.run(program)
    assert result["msg"].startswith(
        "gpufleet-a-0: Its settings had not changed; it is left as it is. It failed: BACKOFF"
    )
    assert "gpufleet-a-0" in bench.pids()


def test_a_run_that_was_cut_off_after_writing_is_taken_up(bench: Bench) -> None:
    bench.run(bench.program(0), bench.program(1))
    before = bench.pids()
    bench.file.write_text("# ours\n" + bench.program(0) + bench.program(1, priority=5))
    result = bench.run(bench.program(0), bench.program(1, priority=5))
    assert result["restarted"] == ["gpufleet-a-1"]
    assert bench.pids()["gpufleet-a-0"] == before["gpufleet-a-0"]


def test_ends_when_all_answer_ready(bench: Bench) -> None:
    ports = {"gpufleet-a-0": free_port(), "gpufleet-a-1": free_port()}
    programs = [
        bench.program(index, bench.script(f"server{index}", SERVER, port, "loading"))
        for index, port in enumerate(ports.values())
    ]
    assert bench.run(*programs, ready_ports=ports)["added"] == list(ports)
    assert not bench.run(*programs, ready_ports=ports)["changed"]


def test_programs_may_swap_their_ports(bench: Bench) -> None:
    ports = [free_port(), free_port()]

    def run() -> dict[str, Any]:
        servers = [bench.script(f"server{index}", SERVER, port, "loading") for index, port in enumerate(ports)]
        programs = [bench.program(index, server, startsecs=1) for index, server in enumerate(servers)]
        return bench.run(*programs, ready_ports={f"gpufleet-a-{index}": port for index, port in enumerate(ports)})

    run()
    ports.reverse()
    assert run()["restarted"] == ["gpufleet-a-0", "gpufleet-a-1"]


def test_a_model_that_failed_to_load_ends_the_wait_at_once(bench: Bench) -> None:
    port = free_port()
    bench.run(bench.program(0))
    begun = time.monotonic()
    result = bench.run(
        bench.program(0, bench.script("server", SERVER, port, "failed")),
        ready_ports={"gpufleet-a-0": port},
        ready_timeout=60,
    )
    assert time.monotonic() - begun < 10
    assert 'HTTP 503 {"state": "failed"}' in result["msg"]
    assert "Put back on its previous settings, it runs" in result["msg"]
    assert bench.file.read_text() == "# ours\n" + bench.program(0)


def test_a_model_that_never_gets_ready_ends_with_the_time_out(bench: Bench) -> None:
    port = free_port()
    result = bench.run(
        bench.program(0, bench.script("server", SERVER, port, "stuck")),
        bench.program(1),
        ready_ports={"gpufleet-a-0": port},
        ready_timeout=1,
    )
    assert result["msg"].startswith("gpufleet-a-0: New, so taken out again. It failed: not ready after")
    assert f"Last lines of {bench.root}/log/gpufleet-a-0.log:\n  serving" in result["msg"]
    assert set(bench.pids()) == {"other", "gpufleet-a-1"}


def test_a_crash_loop_behind_running_is_seen(bench: Bench) -> None:
    """With a load longer than startsecs Supervisor says RUNNING again and again, and never FATAL."""
    looping = bench.script("loop", "import time; time.sleep(1.5); raise SystemExit('out of memory')")
    result = bench.run(
        bench.program(0, looping, startsecs=1, autorestart="true"),
        ready_ports={"gpufleet-a-0": free_port()},
        ready_timeout=60,
    )
    assert "died as pid" in result["msg"] or "EXITED" in result["msg"]
    assert "  out of memory" in result["msg"]


@pytest.mark.parametrize(
    ("process", "pids", "is_late", "fresh", "untouched"),
    [
        (Process("RUNNING", 1, True, "up"), [1], True, None, None),
        (Process("STARTING", 1, True, ""), [1], False, None, None),
        (Process("STOPPED", 0, False, "Not started"), [], False, None, None),
        (Process("STOPPED", 0, False, "Not started"), [], True, "STOPPED: Not started", ...),
        (Process("STARTING", 1, True, ""), [1], True, "still STARTING", ...),
        (Process("EXITED", 0, True, "worn out"), [1], False, "EXITED: worn out", None),
        (Process("EXITED", 0, True, "worn out"), [1], True, "EXITED: worn out", ...),
        (Process("RUNNING", 2, True, "up"), [1, 2], False, "died as pid 1 and was started again as pid 2", None),
        (Process("RUNNING", 3, True, "up"), [1, 2, 3], False, "died as pid 2 and was started again as pid 3", ...),
        (Process("BACKOFF", 0, True, "Exited too quickly"), [1], False, "BACKOFF: Exited too quickly", ...),
        (Process("FATAL", 0, True, "Exited too quickly"), [1], False, "FATAL: Exited too quickly", ...),
        (None, [], False, "Supervisor does not know it. Does its configuration include this file?", ...),
    ],
)
def test_what_keeps_a_program_from_getting_up(
    process: Process | None, pids: list[int], is_late: bool, fresh: str | None, untouched: Any
) -> None:
    """One that this run did not take up may start anew once by itself; ... stands for the same as of a fresh one."""
    assert trouble(process, pids, True, is_late) == fresh
    assert trouble(process, pids, False, is_late) == (fresh if untouched is ... else untouched)


#: Answers ready; once the file is there, that it leaves by itself, which it does after some answers.
LEAVING = """
import http.server, os, sys
told = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global told
        leaves = os.path.exists(sys.argv[2])
        self.send_response(503 if leaves else 200)
        self.end_headers()
        self.wfile.write(b'{"state": "%s"}' % (sys.argv[3].encode() if leaves else b"ready"))
        told += leaves
        if told == 3:
            os.remove(sys.argv[2])
            os._exit(3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("state", ["recycling", "suspect"])
def test_an_untouched_instance_that_starts_anew_by_itself_is_awaited(bench: Bench, state: str) -> None:
    port, leaves = free_port(), bench.root / "leaves"
    program = bench.program(0, bench.script("server", LEAVING, port, leaves, state), 0, autorestart="true")
    bench.run(program, ready_ports={"gpufleet-a-0": port})
    before = bench.pids()
    leaves.touch()
    result = bench.run(program, ready_ports={"gpufleet-a-0": port}, replace=[])
    assert not result.get("failed"), result
    assert not result["changed"]
    assert bench.pids() != before


def test_a_changed_instance_that_takes_itself_out_is_put_back_at_once(bench: Bench) -> None:
    port, leaves = free_port(), bench.root / "leaves"
    bench.run(bench.program(0))
    leaves.touch()
    result = bench.run(
        bench.program(0, bench.script("server", LEAVING, port, leaves, "suspect"), 0, autorestart="true"),
        ready_ports={"gpufleet-a-0": port},
        ready_timeout=60,
    )
    assert result["msg"].startswith("gpufleet-a-0: Put back on its previous settings, it runs. It failed: ")
    assert "died as pid" in result["msg"] or "EXITED" in result["msg"]


def test_a_file_that_supervisord_does_not_include_is_named(bench: Bench) -> None:
    bench.file = bench.file.with_suffix(".disabled")
    assert "Does its configuration include this file?" in bench.run(bench.program(0))["msg"]


def test_check_mode_says_what_would_happen_and_touches_nothing(bench: Bench) -> None:
    bench.run(bench.program(0), bench.program(1), bench.program(2))
    pids, text = bench.pids(), bench.file.read_text()
    result = bench.run(bench.program(0), bench.program(1, priority=5), bench.program(3), check=True)
    assert result["changed"]
    assert (result["added"], result["restarted"], result["removed"]) == (
        ["gpufleet-a-3"],
        ["gpufleet-a-1"],
        ["gpufleet-a-2"],
    )
    assert (bench.pids(), bench.file.read_text()) == (pids, text)
    assert not bench.run(bench.program(0), bench.program(1), bench.program(2), check=True)["changed"]


def test_check_mode_works_on_a_host_without_supervisor(bare: Bench) -> None:
    bare.file = bare.root / "nowhere" / "gpufleet.conf"
    result = bare.run(bare.program(0), check=True, diff=True)
    assert result["changed"]
    assert result["added"] == ["gpufleet-a-0"]
    assert not bare.file.parent.exists()


def test_neither_diff_nor_result_show_secrets(bench: Bench) -> None:
    bench.run(bench.program(0, environment="TOKEN='hunter2',SLOT_GUARD_SLOTS='2'"))
    result = bench.run(bench.program(0, environment="TOKEN='hunter3',SLOT_GUARD_SLOTS='3'"), diff=True)
    assert "hunter" not in json.dumps(result)
    (diff,) = result["diff"]
    assert "environment SLOT_GUARD_SLOTS = 2\n" in diff["before"]
    assert "environment SLOT_GUARD_SLOTS = 3\n" in diff["after"]
    assert diff["before"].count("(hidden, ") == 1


def described(version: str, index: int = 0, host: str = "host") -> dict[str, str]:
    """Options by which a program says which instance it is, on which card and release."""
    instance = f"a-{host}-{index}"
    variables = {"CUDA_VISIBLE_DEVICES": index, "SLOT_GUARD_INSTANCE": instance, "SLOT_GUARD_VERSION": version}
    return {"environment": ",".join(f"{name}='{value}'" for name, value in variables.items())}


def test_without_permission_to_stop_the_new_ones_start_and_the_rest_is_pending(bench: Bench) -> None:
    bench.run(*(bench.program(index, **described("1", index)) for index in range(3)))
    before, text = bench.pids(), bench.file.read_text()
    renamed = described("2", 1, host="renamed")
    wanted = [bench.program(0, **described("1")), bench.program(1, **renamed), bench.program(3)]
    predicted = bench.run(*wanted, check=True, replace=[])
    result = bench.run(*wanted, replace=[])
    assert (result["added"], result["restarted"], result["removed"]) == (["gpufleet-a-3"], [], [])
    assert [
        (entry["program"], entry["change"], entry["instance"], entry["from"], entry["to"])
        for entry in result["pending"]
    ] == [
        ("gpufleet-a-1", "changed", "a-renamed-1", "1", "2"),
        ("gpufleet-a-2", "leaving", "a-host-2", "1", None),
    ]
    assert predicted["pending"] == result["pending"]
    assert {name: pid for name, pid in bench.pids().items() if name in before} == before
    assert sorted(bench.file.read_text().splitlines()) == sorted((text + bench.program(3)).splitlines())
    again = bench.run(*wanted, replace=[])
    assert (again["changed"], again["pending"]) == (False, result["pending"])


def test_only_the_named_programs_are_switched(bench: Bench) -> None:
    bench.run(*(bench.program(index) for index in range(3)))
    before = bench.pids()
    wanted = [bench.program(0, priority=5), bench.program(1, priority=5)]
    result = bench.run(*wanted, replace=["gpufleet-a-0"])
    assert result["restarted"] == ["gpufleet-a-0"]
    assert [entry["program"] for entry in result["pending"]] == ["gpufleet-a-1", "gpufleet-a-2"]
    assert result["seconds"].keys() == {"stop", "ready"}
    after = bench.pids()
    assert {name for name in before if before[name] != after[name]} == {"gpufleet-a-0"}
    assert bench.run(*wanted, replace=["gpufleet-a-2"])["removed"] == ["gpufleet-a-2"]
    assert bench.run(*wanted, replace=["gpufleet-a-1"])["pending"] == []
    assert bench.file.read_text() == "# ours\n" + "".join(wanted)


def test_a_restart_replaces_the_named_program_though_nothing_of_it_has_changed(bench: Bench) -> None:
    programs = [bench.program(index, **described("1", index)) for index in range(3)]
    bench.run(*programs)
    before, text = bench.pids(), bench.file.read_text()
    both = ["gpufleet-a-0", "gpufleet-a-1"]
    asked = bench.run(*programs, restart=both, replace=[], check=True)
    assert [(one["program"], one["change"], one["from"], one["to"]) for one in asked["pending"]] == [
        ("gpufleet-a-0", "restart", "1", "1"),
        ("gpufleet-a-1", "restart", "1", "1"),
    ]
    predicted = bench.run(*programs, restart=both, replace=both[:1], check=True)
    assert (predicted["changed"], predicted["restarted"], len(predicted["pending"])) == (True, both[:1], 1)
    assert bench.pids() == before
    result = bench.run(*programs, restart=both, replace=both[:1])
    assert {key: result[key] for key in ("changed", "restarted", "pending")} == {
        key: predicted[key] for key in ("changed", "restarted", "pending")
    }
    assert result["seconds"].keys() == {"stop", "ready"}
    after = bench.pids()
    assert {name for name in before if before[name] != after[name]} == {"gpufleet-a-0"}
    assert bench.file.read_text() == text


def test_a_restart_starts_what_is_down_and_leaves_a_neighbour_that_is(bench: Bench) -> None:
    bench.run(bench.program(0), bench.program(1))
    for name in ("gpufleet-a-0", "gpufleet-a-1"):
        bench.order("stop", name)
        bench.wait(name, "STOPPED")
    restart = ["gpufleet-a-0"]
    assert bench.run(bench.program(0), bench.program(1), restart=restart, replace=restart)["restarted"] == restart
    pids = bench.pids()
    assert pids["gpufleet-a-0"] and not pids["gpufleet-a-1"]


def test_a_restart_that_fails_says_so_and_leaves_the_program_as_it_is(bench: Bench) -> None:
    failing = bench.script(
        "failing", f"import os, time\nos.path.exists('{bench.root}/bad') and exit(1)\ntime.sleep(99)"
    )
    program = bench.program(0, failing, startsecs=1)
    bench.run(program)
    (bench.root / "bad").touch()
    result = bench.run(program, restart=["gpufleet-a-0"], replace=["gpufleet-a-0"])
    assert result["msg"].startswith(
        "gpufleet-a-0: Its settings had not changed; it is left as it is. It failed: BACKOFF"
    )


@pytest.mark.parametrize("check", [False, True])
def test_a_restart_of_what_is_not_there_is_refused(bench: Bench, check: bool) -> None:
    bench.run(bench.program(0))
    before = bench.pids()
    result = bench.run(bench.program(0), restart=["gpufleet-a-0", "gpufleet-a-7"], check=check)
    assert result["msg"].startswith("gpufleet-a-7: not among the programs of this host")
    assert bench.pids() == before


def test_a_restart_and_a_change_of_one_program_are_one_change(bench: Bench) -> None:
    bench.run(bench.program(0))
    wanted = [bench.program(0, priority=5), bench.program(1)]
    asked = bench.run(*wanted, restart=["gpufleet-a-0", "gpufleet-a-1"], replace=[])
    assert [(one["program"], one["change"]) for one in asked["pending"]] == [("gpufleet-a-0", "changed")]
    assert asked["added"] == ["gpufleet-a-1"]


def test_a_newcomer_waits_for_the_card_or_port_of_one_that_is_still_there(bench: Bench) -> None:
    binding = "/bin/sh -c 'sleep 1000' sh --bind"
    bench.run(bench.program(0, f"{binding} 0.0.0.0:12321"), bench.program(1, **described("1", 7)))
    newcomers = [
        bench.program(2, f"{binding} [::]:12321"),
        bench.program(3, **described("1", 7)),
        bench.program(4),
    ]
    result = bench.run(*newcomers, replace=[], check=True)
    assert result["added"] == ["gpufleet-a-4"]
    assert {entry["program"]: (entry["change"], entry["port"]) for entry in result["pending"]} == {
        "gpufleet-a-0": ("leaving", 12321),
        "gpufleet-a-1": ("leaving", None),
        "gpufleet-a-2": ("added", None),
        "gpufleet-a-3": ("added", None),
    }


def test_a_switch_that_was_cut_off_is_pending_and_not_made_up_for_undrained(bench: Bench) -> None:
    bench.run(bench.program(0))
    before = bench.pids()
    bench.file.write_text("# ours\n" + bench.program(0, priority=5))
    result = bench.run(bench.program(0, priority=5), replace=[])
    assert [(entry["program"], entry["change"]) for entry in result["pending"]] == [("gpufleet-a-0", "changed")]
    assert bench.pids() == before
    assert bench.run(bench.program(0, priority=5), replace=["gpufleet-a-0"])["restarted"] == ["gpufleet-a-0"]


def test_a_neighbour_that_broke_meanwhile_does_not_stop_the_switch_of_another(bench: Bench) -> None:
    bench.run(bench.program(0), bench.program(1))
    bench.order("stop", "gpufleet-a-1")
    bench.wait("gpufleet-a-1", "STOPPED")
    wanted = [bench.program(0, priority=5), bench.program(1)]
    for check in (True, False):
        result = bench.run(*wanted, replace=["gpufleet-a-0"], check=check)
        assert (result["restarted"], result["started"]) == (["gpufleet-a-0"], [])


def test_a_program_that_answers_ready_and_then_wrong_is_put_back_and_ready_again(bench: Bench) -> None:
    port = free_port()
    smoke = {"gpufleet-a-0": {"path": "/speak", "body": "", "content_type": "", "timeout": 5}}
    server = bench.program(0, f"{bench.script('server', SERVER, port, 'loading')} --bind 127.0.0.1:{port}")
    bench.run(server, ready_ports={"gpufleet-a-0": port}, smoke=smoke)
    wrong = SERVER.replace("ready = ", 'ready = "ready" in self.path or self.path != "/speak" and ')
    result = bench.run(
        bench.program(0, bench.script("wrong", wrong.replace("asked >= 3", "False"), port, "loading")),
        ready_ports={"gpufleet-a-0": port},
        smoke=smoke,
    )
    assert result["msg"].startswith(
        "gpufleet-a-0: Put back on its previous settings, it runs. "
        "It failed: its smoke request failed: /speak: HTTP 503"
    )
    assert Readiness({"gpufleet-a-0": port}).ask(["gpufleet-a-0"])["gpufleet-a-0"][0] == "ready"


@pytest.mark.parametrize("refusal", ["full", "suspect"])
def test_a_trial_that_finds_every_slot_taken_by_clients_is_no_fault(bench: Bench, refusal: str) -> None:
    port = free_port()
    busy = SERVER.replace(
        "        self.end_headers", f'        self.send_header("X-Slot-Guard", "{refusal}")\n        self.end_headers'
    ).replace("200 if ready else 503", '429 if self.path == "/speak" else 200 if ready else 503')
    result = bench.run(
        bench.program(0, bench.script("busy", busy, port, "loading")),
        ready_ports={"gpufleet-a-0": port},
        smoke={"gpufleet-a-0": {"path": "/speak", "body": "", "content_type": "", "timeout": 5}},
    )
    assert result.get("failed", False) == (refusal != "full"), result


def test_an_answer_is_not_made_to_wait_for_startsecs(bench: Bench) -> None:
    port = free_port()
    program = bench.program(0, bench.script("server", SERVER, port, "loading"), startsecs=30)
    begun = time.monotonic()
    assert bench.run(program, ready_ports={"gpufleet-a-0": port})["added"] == ["gpufleet-a-0"]
    assert time.monotonic() - begun < 15


def test_supervisord_is_started_where_it_does_not_run(bare: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl = bare.root / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(f'#!/bin/sh\n[ "$*" = "enable --now supervisor" ] && exec {" ".join(bare.supervisord)}\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{systemctl.parent}:{os.environ['PATH']}")
    try:
        assert bare.run(bare.program(0))["added"] == ["gpufleet-a-0"]
    finally:
        bare.end()


def test_a_supervisord_that_does_not_come_up_is_named(bare: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl = bare.root / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text("#!/bin/sh\necho Unit supervisor.service not found. >&2\nexit 5\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{systemctl.parent}:{os.environ['PATH']}")
    message = bare.run(bare.program(0))["msg"]
    assert f"nothing answers at {bare.socket}" in message
    assert "Unit supervisor.service not found" in message
    assert not bare.file.exists()


def test_files_are_there_before_the_program_that_reads_them_starts(bench: Bench) -> None:
    path = bench.root / "read" / "config"
    reader = bench.script("reader", f"print(open({str(path)!r}).read(), flush=True)\nimport time\ntime.sleep(9)")
    program = bench.program(0, reader, startsecs=1)
    predicted = bench.run(program, files={str(path): "text 1"}, check=True, diff=True)
    assert predicted["changed"] and not path.exists()
    assert [diff["after"] for diff in predicted["diff"][1:]] == ["text 1"]
    assert bench.run(program, files={str(path): "text 1"})["changed"]
    assert "text 1" in (bench.root / "log/gpufleet-a-0.log").read_text()
    pids = bench.pids()
    assert bench.run(program, files={str(path): "text 2"})["changed"]
    assert path.read_text() == "text 2" and bench.pids() == pids
    assert not bench.run(program, files={str(path): "text 2"})["changed"]


def test_each_file_of_programs_has_a_drop_in_of_its_own() -> None:
    """A gateway may be a GPU server too: the agent's must not take the place of the instances'."""

    def path(file: str) -> Path:
        params = {"service": "supervisor", "path": f"/etc/supervisor/conf.d/{file}"}
        return supervisor_programs.override_path(SimpleNamespace(params=params))

    folder = Path("/etc/systemd/system/supervisor.service.d")
    assert [path("gpufleet.conf"), path("fleet-agent.conf")] == [folder / "gpufleet.conf", folder / "fleet-agent.conf"]

# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""The module drain against guards that are loopback HTTP servers, with real flag files."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpufleet.core.plugins.module_utils import gateway_state, instances
from ansible_collections.gpufleet.core.plugins.module_utils.instances import Answer, Instance
from ansible_collections.gpufleet.core.plugins.modules import drain
from ansible_collections.gpufleet.core.plugins.modules.drain import CONNECT_ATTEMPTS, SETTLE_SECONDS

from tests.unit.service_helpers import free_port


class Guard:
    """A guard that works on ``in_flight`` requests and is ready or not; ``held`` seconds pass before it answers.

    ``waiting`` requests wait for one of its slots, until they are sent away.
    """

    def __init__(self, in_flight: int = 0, ready: bool = True, held: float = 0, waiting: int = 0) -> None:
        self.in_flight, self.ready, self.held, self.waiting = in_flight, ready, held, waiting
        guard = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(guard.held)
                is_ready = self.path != "/_slot_guard/ready" or guard.ready
                with contextlib.suppress(OSError):
                    self.send_response(200 if is_ready else 503)
                    self.end_headers()
                    status = {"in_flight": guard.in_flight, "waiting": guard.waiting, "state": "ready"}
                    self.wfile.write(json.dumps(status).encode())

            def do_POST(self) -> None:
                assert self.path == "/_slot_guard/send_away"
                guard.waiting = 0
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def guard() -> Iterator[Callable[..., Guard]]:
    """Start guards; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(**how: Any) -> Guard:
            made = Guard(**how)
            stack.callback(made.end)
            return made

        yield start


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Call the module for instances `a`, `b`, … given by port; the result has ``failed`` where it failed."""

    def call(*ports: int | None, state: str = "drained", check: bool = False, **options: Any) -> dict[str, Any]:
        listed = [{"id": name, "address": "127.0.0.1", "port": port} for name, port in zip("abc", ports, strict=False)]
        arguments = {"instances": listed, "state": state, "by": "alice@desk", "directory": str(tmp_path), **options}
        capsys.readouterr()
        with patch_module_args({**arguments, "_ansible_check_mode": check}), contextlib.suppress(SystemExit):
            drain.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return call


def audit(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]


def test_an_idle_instance_is_flagged_and_a_second_run_changes_nothing(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], tmp_path: Path
) -> None:
    port = guard().port
    first = run(port, reason="fan")
    assert (first["changed"], first["flags"], first["busy"]) == (True, ["a"], {})
    assert first["seconds"] >= SETTLE_SECONDS
    flag = tmp_path / "drain" / "a"
    assert json.loads(flag.read_text()).keys() == {"owner", "by", "reason", "since"}
    assert (flag.stat().st_mode & 0o777, flag.parent.stat().st_mode & 0o777) == (0o644, 0o755)
    assert [path.name for path in flag.parent.iterdir()] == ["a"]
    assert not run(port)["changed"]


def test_waits_for_the_last_request_with_the_flag_raised(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], tmp_path: Path
) -> None:
    busy = guard(in_flight=2)
    flags: list[bool] = []

    def finish() -> None:
        flags.append((tmp_path / "drain" / "a").exists())
        busy.in_flight = 0

    threading.Timer(1.5, finish).start()
    result = run(busy.port, guard().port)
    assert flags == [True]
    assert 1.4 < result["seconds"] < 3
    assert result["busy"] == {}


def test_of_several_gateways_all_but_the_last_raise_the_flag_and_go_on(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], tmp_path: Path
) -> None:
    result = run(guard(in_flight=2).port, wait=False)
    assert (result["flags"], result["busy"]) == (["a"], {})
    assert result["seconds"] < SETTLE_SECONDS
    assert (tmp_path / "drain" / "a").exists()


def test_who_waits_there_is_sent_away_while_the_work_goes_on(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard]
) -> None:
    busy = guard(in_flight=1, waiting=3)
    assert run(busy.port, timeout=0.3)["busy"] == {"a": "1 in flight"}
    assert busy.waiting == 0


def test_names_who_is_still_at_work_at_the_limit_and_keeps_the_flag(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], tmp_path: Path
) -> None:
    result = run(guard(in_flight=1).port, guard().port, timeout=1)
    assert result["failed"]
    assert result["msg"].startswith("Still at work after 1 s: a: 1 in flight. No new request")
    assert result["busy"] == {"a": "1 in flight"}
    assert (tmp_path / "drain" / "a").exists()
    assert {line["instance"]: line["result"] for line in audit(tmp_path)} == {
        "a": "busy at the time limit: 1 in flight",
        "b": "ok",
    }


def test_a_dead_instance_counts_as_drained(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = run(free_port())
    assert "ConnectionRefusedError" in result["silent"]["a"]
    assert result["flags"] == ["a"]
    assert audit(tmp_path)[0]["result"].startswith("unreachable: ConnectionRefusedError")


def test_a_host_that_swallows_packets_is_dead_after_some_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def silent(self: Instance, question: str) -> Answer:
        asked.append(question)
        return Answer(problem="TimeoutError: timed out", connected=False)

    monkeypatch.setattr(Instance, "ask", silent)
    unreachable, busy = drain.await_idle([Instance("a", "192.0.2.1", 1)], 30)
    assert (unreachable, busy, len(asked)) == ({"a": "TimeoutError: timed out"}, {}, CONNECT_ATTEMPTS)


def test_an_app_that_holds_its_event_loop_is_busy_and_not_dead(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "ANSWER_SECONDS", 0.2)
    blocked = guard(held=0.5)
    result = run(blocked.port, timeout=1)
    assert "timed out" in result["busy"]["a"]
    assert result["silent"] == {}


def test_a_rollout_gives_up_waiting_for_one_that_never_tells(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "ANSWER_SECONDS", 0.2)
    result = run(guard(held=0.5).port, guard(in_flight=1).port, timeout=1, owner="rollout")
    assert result["busy"] == {"b": "1 in flight"}
    assert "timed out" in result["silent"]["a"]


def test_undrain_lets_requests_in_again(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(None)
    result = run(None, state="serving")
    assert (result["changed"], result["flags"]) == (True, ["a"])
    assert list((tmp_path / "drain").iterdir()) == []
    assert not run(None, state="serving")["changed"]
    assert [(line["what"], line["from"], line["to"], line["by"]) for line in audit(tmp_path)] == [
        ("drain", "serving", "drained", "alice@desk"),
        ("undrain", "drained", "serving", "alice@desk"),
    ]


def test_a_rollout_neither_takes_over_nor_lifts_an_operators_flag(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(None, reason="fan broken")
    assert not run(None, owner="rollout", by="bob@ci")["changed"]
    result = run(None, owner="rollout", by="bob@ci", state="serving")
    assert not result["changed"]
    assert result["kept"]["a"].startswith("drained by alice@desk since 20")
    assert result["kept"]["a"].endswith(": fan broken")
    assert (tmp_path / "drain" / "a").exists()


def test_a_flag_made_by_hand_is_an_operators(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "drain").mkdir()
    (tmp_path / "drain" / "a").touch()
    assert not run(None, owner="rollout", state="serving")["changed"]
    assert run(None, state="serving")["flags"] == ["a"]


def test_an_operator_takes_over_the_flag_of_a_rollout(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(None, owner="rollout", by="bob@ci")
    assert run(None)["changed"]
    assert run(None, owner="rollout", state="serving")["kept"]
    assert run(None, state="serving")["flags"] == ["a"]


def test_a_rollout_lifts_its_flag_only_from_an_instance_that_is_ready(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], tmp_path: Path
) -> None:
    ports = (guard().port, guard(ready=False).port)
    run(*ports, owner="rollout")
    result = run(*ports, owner="rollout", state="serving", require_ready=0.5)
    assert result["flags"] == ["a"]
    assert result["failed"]
    assert result["msg"].startswith("Not let in again: b: it does not answer ready: HTTP 503")
    assert [path.name for path in (tmp_path / "drain").iterdir()] == ["b"]


def test_an_operator_may_drain_what_a_rollout_is_about_to_let_in_again(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], tmp_path: Path
) -> None:
    (flags := tmp_path / "drain").mkdir()
    (flags / "a").write_text('{"owner": "rollout"}')
    starting = guard(ready=False)

    def drained_meanwhile() -> None:
        (flags / "a").write_text('{"owner": "operator", "by": "alice@desk", "reason": "fan"}')
        starting.ready = True

    threading.Timer(0.3, drained_meanwhile).start()
    result = run(starting.port, owner="rollout", by="bob@ci", state="serving", require_ready=5)
    assert (result["flags"], result["not_ready"]) == ([], {})
    assert result["kept"]["a"].startswith("drained by alice@desk")
    assert (flags / "a").exists()


def test_an_instance_that_the_agent_still_flags_does_not_serve_yet(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], tmp_path: Path
) -> None:
    down = tmp_path / "down"
    down.mkdir()
    (down / "a").touch()
    port = guard().port
    run(port, owner="rollout")
    options = {"owner": "rollout", "state": "serving", "down_directory": str(down)}
    assert run(port, require_ready=0.3, **options)["not_ready"] == {"a": f"the agent has it flagged as down in {down}"}
    threading.Timer(0.5, (down / "a").unlink).start()
    assert run(port, require_ready=5, **options)["flags"] == ["a"]


def test_lines_of_a_rollout_are_written_in_the_same_call(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(None, owner="rollout", audit=[{"what": "rollout", "instance": "a", "from": "1", "to": "2", "result": "ok"}])
    (line,) = audit(tmp_path)
    assert list(line) == ["time", "by", "what", "instance", "from", "to", "result"]
    assert line["by"] == "alice@desk"


def test_the_agent_may_read_the_audit_log_whatever_umask(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        run(None)
    finally:
        os.umask(umask)
    log = tmp_path / "audit.log"
    assert log.stat().st_mode & 0o777 == 0o644
    log.chmod(0o600)
    run(None, state="serving")
    assert log.stat().st_mode & 0o777 == 0o600, "an operator's own choice stays"


def test_an_audit_log_that_is_long_begins_anew(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_state, "AUDIT_BYTES", 100)
    for state in ("drained", "serving", "drained"):
        run(None, state=state)
    old = (tmp_path / "audit.log.1").read_text().splitlines()
    assert [json.loads(line)["what"] for line in old] == ["undrain"]
    assert [line["what"] for line in audit(tmp_path)] == ["drain"]


def test_an_audit_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "audit.log").mkdir()
    warnings: list[str] = []
    options = {"owner": "operator", "by": "alice@desk", "reason": "", "wait": True, "timeout": 1, "audit": []}
    parameters = {"instances": [{"id": "a"}], "state": "drained", "directory": str(tmp_path), **options}
    assert drain.run(parameters, False, warnings.append)["flags"] == ["a"]
    (warning,) = warnings
    assert warning.startswith("The audit log could not be written: [Errno 21]")


def test_the_drains_of_what_left_the_fleet_are_forgotten(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(None, None, None)
    assert run(None, state="forgotten", check=True)["flags"] == ["b", "c"]
    assert run(None, state="forgotten")["flags"] == ["b", "c"]
    assert [flag.name for flag in (tmp_path / "drain").iterdir()] == ["a"]
    assert not run(None, state="forgotten")["changed"]
    assert [(line["what"], line["instance"]) for line in audit(tmp_path)[3:]] == [
        ("forget the drain", "b"),
        ("forget the drain", "c"),
    ]


def test_a_new_gateway_takes_the_drains_of_another_one_over_as_they_are(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    old = str(tmp_path / "old")
    run(None, None, directory=old, reason="fan")
    drains = run(None, None, None, state="forgotten", directory=old)["drains"]
    assert (drains.keys(), drains["a"]["reason"]) == ({"a", "b"}, "fan")
    run(None, reason="noise")
    for check in (True, False):
        assert run(state="taken_over", drains=drains, check=check)["flags"] == ["b"]
    assert not run(state="taken_over", drains=drains)["changed"]
    flags = {flag.name: json.loads(flag.read_text()) for flag in (tmp_path / "drain").iterdir()}
    assert (flags["a"]["reason"], flags["b"]) == ("noise", drains["b"])
    assert audit(tmp_path)[-1]["what"] == "take the drain over"


def test_a_gateway_notes_with_whom_it_is_in_agreement(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert run(state="forgotten")["gateways"] is None
    run(state="taken_over", gateways=["gw1"], check=True)
    assert list(tmp_path.iterdir()) == []
    assert not run(state="taken_over", gateways=["gw1", "gw2"])["changed"]
    assert run(state="forgotten")["gateways"] == ["gw1", "gw2"]


def test_an_operator_s_drain_on_another_gateway_goes_before_a_rollout_s(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(None, None, owner="rollout")
    drains = {"a": {"owner": "operator", "by": "alice@desk"}, "b": {"owner": "rollout"}}
    assert run(state="taken_over", drains=drains)["flags"] == ["a"]
    assert json.loads((tmp_path / "drain" / "a").read_text()) == drains["a"]


def test_check_mode_says_what_would_be_and_touches_nothing(
    run: Callable[..., dict[str, Any]], guard: Callable[..., Guard], tmp_path: Path
) -> None:
    port = guard(in_flight=1).port
    assert run(port, check=True)["flags"] == ["a"]
    assert list(tmp_path.iterdir()) == []
    run(None)
    assert run(None, check=True, state="serving")["flags"] == ["a"]
    assert (tmp_path / "drain" / "a").exists()

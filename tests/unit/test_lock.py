# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""The lock of changing runs: real files, and real processes that hold it or have ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpufleet.core.plugins.action.rollout_lock import has_ended, start_of, this_run
from ansible_collections.gpufleet.core.plugins.modules import rollout_lock
from ansible_collections.gpufleet.core.plugins.modules.rollout_lock import Locked, hold

ALICE = {"by": "alice@desk", "controller": "desk", "pid": 17, "started": "boot/1"}
BOB = {"by": "bob@ci", "controller": "ci", "pid": 17, "started": "boot/1"}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Call the module for a holder; the result has ``failed`` where it failed."""

    def call(holder: dict[str, Any], state: str = "held", check: bool = False, **options: Any) -> dict[str, Any]:
        arguments = {"state": state, "what": "site.yml", "holder": holder, "directory": str(tmp_path / "state")}
        capsys.readouterr()
        with (
            patch_module_args({**arguments, **options, "_ansible_check_mode": check}),
            contextlib.suppress(SystemExit),
        ):
            rollout_lock.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return call


def test_a_second_run_is_told_who_since_when_what_and_how_to_break_it(run: Callable[..., dict[str, Any]]) -> None:
    since = run(ALICE)["holder"]["since"]
    result = run(BOB)
    assert result["failed"]
    assert result["msg"] == (
        f"alice@desk is changing the fleet since {since}: site.yml, process 17 on desk. "
        "Wait for its end; if it has died, add -e break_lock=true to take the lock over."
    )


def test_a_run_may_ask_twice_and_frees_once(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(ALICE)
    assert not run(ALICE).get("failed")
    assert not run(ALICE, "free").get("failed")
    assert not (tmp_path / "state" / "lock.json").exists()
    assert not run(ALICE, "free").get("failed")
    assert not run(BOB).get("failed")


def test_a_broken_lock_is_in_the_audit_log_and_its_former_holder_learns_of_it(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(ALICE)
    assert run(BOB, break_lock=True)["taken_over"]["by"] == "alice@desk"
    (line,) = (tmp_path / "state" / "audit.log").read_text().splitlines()
    assert json.loads(line)["by"] == "bob@ci"
    assert "alice@desk is changing the fleet since" in json.loads(line)["from"]
    assert run(ALICE, "free")["msg"].startswith("The lock of this run was broken meanwhile. bob@ci is changing")
    assert run(ALICE)["failed"]


def test_only_the_run_that_is_known_to_have_ended_is_taken_over(run: Callable[..., dict[str, Any]]) -> None:
    run(ALICE)
    assert run(BOB, ended={**ALICE, "pid": 18})["failed"]
    assert not run(BOB, ended=ALICE).get("failed")


def test_a_lock_that_is_no_record_is_held_by_somebody(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "lock.json").write_text("")
    assert run(BOB)["msg"].startswith("somebody is changing the fleet since an unknown time")


def test_check_mode_takes_nothing_and_still_sees_the_lock(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert not run(ALICE, check=True).get("failed")
    assert not (tmp_path / "state").exists()
    run(ALICE)
    assert run(BOB, check=True)["failed"]


def test_a_check_run_after_one_that_was_cut_off_ends_well_and_leaves_its_lock(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run(ALICE)
    assert not run(BOB, check=True, ended=ALICE).get("failed")
    assert not run(BOB, "free", check=True).get("failed")
    assert run(BOB)["failed"]


def test_of_many_runs_at_once_one_gets_the_lock(tmp_path: Path) -> None:
    def attempt(number: int) -> bool:
        try:
            hold(tmp_path / "state" / "lock.json", {**BOB, "pid": number}, None, False, False)
        except Locked:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(attempt, range(64))) == 1


def test_a_process_that_has_ended_is_told_from_one_that_runs_and_from_its_pids_next_user() -> None:
    mine = this_run()
    assert mine["pid"] == os.getppid()
    assert not has_ended(mine, mine["controller"])
    assert has_ended({**mine, "started": "another boot/1"}, mine["controller"])
    assert not has_ended({**mine, "pid": 0, "controller": "elsewhere"}, mine["controller"])
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = start_of(process.pid)
        other = {**mine, "pid": process.pid, "started": started}
        assert started
        assert not has_ended(other, mine["controller"])
    assert has_ended(other, mine["controller"])

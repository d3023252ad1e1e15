"""What people read, and with -e output=json one document for programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    def run(*arguments, fails=False):
        tell = {"ansible.builtin.set_stats": {"data": {"document": {"ok": not fails, "text": "好"}}}}
        check = {"ansible.builtin.assert": {"that": not fails, "fail_msg": "something is wrong"}}
        (tmp_path / "play.yml").write_text(
            yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "tasks": [tell, check]}])
        )
        return subprocess.run(
            [sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", *arguments, tmp_path / "play.yml"],
            env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
            capture_output=True,
            text=True,
        )

    return run


def test_people_read_what_they_are_used_to(run):
    done = run()
    assert "PLAY RECAP" in done.stdout and "好" not in done.stdout


@pytest.mark.parametrize("arguments", [["-e", "output=json"], ["-e", '{"output": "json"}']], ids=str)
def test_programs_get_the_document_and_nothing_else(run, arguments):
    done = run(*arguments)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"ok": True, "text": "好"}
    assert "PLAY RECAP" in done.stderr


def test_what_fails_still_hands_over_its_document(run):
    done = run("-e", "output=json", fails=True)
    assert done.returncode != 0
    assert json.loads(done.stdout)["ok"] is False
    assert "something is wrong" in done.stderr

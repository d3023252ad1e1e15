"""Every bad inventory is refused with exactly the lines that its own head promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inventories.loader import derive_from

PROJECT = Path(__file__).parents[2]
REFUSED = sorted((PROJECT / "tests/inventories/refused").glob("*.yml"))
MARK = "# refused: "


def expected_faults(inventory):
    return [line.removeprefix(MARK) for line in inventory.read_text().splitlines() if line.startswith(MARK)]


def test_there_are_enough_bad_inventories():
    assert len(REFUSED) >= 25


@pytest.mark.parametrize("inventory", REFUSED, ids=lambda path: path.stem)
def test_all_faults_are_named(inventory):
    assert expected_faults(inventory), f"{inventory} promises no fault"
    assert derive_from(inventory)["faults"] == expected_faults(inventory)


def play(playbook, inventory, *arguments):
    return subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", inventory, playbook, *arguments],
        cwd=PROJECT,
        env={**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("no_gpu_servers", []),
        ("gpu_count_misspelt", ["--tags", "gateway"]),
        ("many_faults_at_once", ["--limit", "gateway,gpu02"]),
        ("many_faults_at_once", []),
    ],
)
def test_the_playbook_stops_before_any_host(name, arguments):
    """The hosts of these inventories do not exist: an attempt to reach one would show as UNREACHABLE."""
    inventory = PROJECT / f"tests/inventories/refused/{name}.yml"
    run = play("site.yml", inventory, *arguments)
    assert run.returncode != 0
    for fault in expected_faults(inventory):
        assert fault in run.stdout
    assert "UNREACHABLE" not in run.stdout
    assert "PLAY [Give every GPU" not in run.stdout


@pytest.mark.parametrize("name", ["drain", "undrain", "restart", "remove_host", "status", "smoke", "doctor"])
def test_what_works_from_localhost_refuses_a_limit_under_which_it_would_do_nothing(name):
    run = play(f"playbooks/{name}.yml", "inventory/example", "-e", "target=gpu01", "--limit", "gpu01")
    assert run.returncode != 0
    assert 'all: --limit = "gpu01": would leave out localhost' in run.stdout
    assert "UNREACHABLE" not in run.stdout

"""What every role promises: one interface, told once in its defaults and once in its specification."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
ROLES = sorted(path.name for path in (PROJECT / "roles").iterdir())


def load(path):
    return yaml.safe_load((PROJECT / path).read_text()) or {}


def options_of(role):
    """Options of all entry points of a role by name."""
    entry_points = load(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]
    return {name: option for point in entry_points.values() for name, option in point.get("options", {}).items()}


@pytest.mark.parametrize("role", ROLES)
def test_specification_and_defaults_name_the_same_variables(role):
    assert set(options_of(role)) == set(load(f"roles/{role}/defaults/main.yml"))


@pytest.mark.parametrize("role", ROLES)
def test_specification_and_defaults_give_the_same_values(role):
    defaults = load(f"roles/{role}/defaults/main.yml")
    for name, option in options_of(role).items():
        assert option["description"], name
        if "default" in option:
            assert option["default"] == defaults[name], name


@pytest.mark.parametrize("role", ROLES)
def test_every_entry_point_is_a_task_file(role):
    for entry_point in load(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]:
        assert (PROJECT / f"roles/{role}/tasks/{entry_point}.yml").is_file()


def test_the_production_example_can_be_read_and_each_role_is_a_tag():
    program = Path(sys.executable).with_name("ansible-playbook")
    command = [program, "-i", "inventory/example", "site.yml", "--list-tasks", "--list-hosts", "--list-tags"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert [line.split("TASK TAGS: ")[1] for line in done.stdout.splitlines() if "TASK TAGS" in line] == [
        "[always]",
        "[always]",
        "[always, conda_env, gpu_workers, service_code]",
        "[agent, always, gateway]",
        "[always, gpu_workers]",
        "[monitoring]",
        "[always, monitoring]",
        "[always]",
    ]

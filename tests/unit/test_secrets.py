"""A service's environment may hold passwords: where one shows, and that it shows nowhere else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.gpufleet.core.plugins.module_utils.entrance import hash_of
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive
from cryptography.hazmat.primitives.asymmetric import ec

from tests.templates.render import PROJECT, render, role_variables
from tests.unit.test_certificate import issue, pem
from tools.apikey import new_key

SECRET = "hunter2-of-the-service"
KEY = new_key("alice")
TLS_KEY = ec.generate_private_key(ec.SECP256R1())
SERVICE = {
    "route": "/tts/",
    "app": "tts_service.app:app",
    "code": {"source": "service/tts"},
    "conda_env": "tts",
    "environment": {"TOKEN": SECRET, "TTS_ENGINE": "espeak"},
    "smoke": {"path": "health"},
    "client_limit": 4,
}
HOSTS = {
    "gpu01": {"ansible_host": "10.0.0.1", "gpu_count": 2, "ansible_connection": "local"},
    "gateway": {
        "ansible_host": "10.0.0.100",
        "ansible_connection": "local",
        "api_keys": {"alice": {"hashes": [hash_of(KEY)]}},
        "gateway_tls": {"certificate": issue("gateway", TLS_KEY), "key": pem(TLS_KEY)},
    },
}


@pytest.fixture(scope="module")
def fleet():
    groups = {"gpu_servers": ["gpu01"], "gateways": ["gateway"]}
    derived = derive({"tts": SERVICE}, groups, HOSTS, conda_envs={"tts": {"lock": "envs/tts"}})
    assert derived["faults"] == []
    return derived


@pytest.fixture
def play(tmp_path, fleet):
    """Run a playbook as verbosely as Ansible goes on a run that shows its diffs; return all it said."""
    groups = {
        name: {"hosts": {host: HOSTS[host]}} for name, host in (("gpu_servers", "gpu01"), ("gateways", "gateway"))
    }
    variables = {"services": {"tts": SERVICE}, "conda_envs": {"tts": {"lock": "envs/tts"}}}
    inventory = tmp_path / "inventory.yml"
    inventory.write_text(yaml.safe_dump({"all": {"vars": variables, "children": groups}}))

    def run(playbook, *arguments, **settings):
        program = Path(sys.executable).with_name("ansible-playbook")
        command = [program, "-i", inventory, playbook, "--check", "--diff", "-vvvv", *arguments]
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
            "ANSIBLE_HOME": str(tmp_path),
            **settings,
        }
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_the_derived_fleet_is_not_told(play):
    said = play("playbooks/show.yml")
    assert "tts-gpu01-1" in said
    assert SECRET not in said


def test_neither_rendering_nor_running_programs_tells_a_secret(play, tmp_path, fleet):
    """The role's own tasks from the rendering on, in check mode on this machine, where no program is."""
    releases = {
        "conda_env_releases": {"tts": {"path": "/opt/conda/releases/tts/c0ffee"}},
        "service_code_releases": {"tts": {"path": "/opt/gpufleet/tts/releases/f00d", "id": "f00d"}},
    }
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"fleet": fleet, **releases}))
    playbook = tmp_path / "play.yml"
    playbook.write_text("[{hosts: gpu_servers, gather_facts: false, roles: [gpu_workers]}]")
    variables = {"ansible_playbook_python": sys.executable, "ansible_python_interpreter": sys.executable}
    arguments = ["-e", f"@{known}", "-e", json.dumps(variables), "--start-at-task", "Render the programs"]
    said = play(playbook, *arguments)
    assert "environment SLOT_GUARD_INSTANCE = tts-gpu01-1" in said, "the diff shows what is no secret"
    assert len(set(re.findall(r"environment TOKEN = \(hidden, \w+\)", said))) == 1
    assert SECRET not in said


def test_neither_keys_nor_their_hashes_are_told_where_they_are_brought(play, tmp_path, fleet):
    """The role's own tasks in check mode on this machine, where no gateway is."""
    found = {"certified": False, "has_vip": False}
    (tmp_path / "known.json").write_text(json.dumps({"fleet": fleet, "__preflight_host": found}))
    (tmp_path / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "systemctl").chmod(0o755)
    playbook = tmp_path / "play.yml"
    playbook.write_text("[{hosts: gateways, gather_facts: false, roles: [gateway]}]")
    variables = {"ansible_python_interpreter": sys.executable}
    task = "Serve the whole configuration, or keep the old one"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = play(playbook, "-e", f"@{tmp_path}/known.json", "-e", json.dumps(variables), "--start-at-task", task, **path)
    assert re.search(r"ssl_certificate_key /etc/nginx/gpufleet/\w{16}/key.pem;", said), (
        "the diff shows what is no secret"
    )
    assert "alice" in said
    assert pem(TLS_KEY).splitlines()[1] not in said
    assert hash_of(KEY).split(".")[2] not in said


@pytest.mark.parametrize(
    ("role", "template"),
    [
        ("gateway", "nginx.conf.j2"),
        ("gateway", "tmpfiles.conf.j2"),
        ("agent", "agent.json.j2"),
        ("gpu_workers", "firewall.nft.j2"),
        ("gpu_workers", "supervisor.service.conf.j2"),
    ],
)
def test_no_file_that_all_may_read_holds_a_secret(fleet, role, template):
    variables = role_variables(role) if (PROJECT / f"roles/{role}/vars/main.yml").exists() else {}
    text = render(role, template, fleet, inventory_hostname="gpu01", **variables)
    assert len(text) > 50
    assert SECRET not in text
    assert hash_of(KEY).split(".")[2] not in text


def test_the_flags_are_neither_the_services_nor_anybody_elses(fleet):
    """A service that raised or cleared flags would admit or starve itself and all others."""
    rules = [line.split() for line in render("gateway", "tmpfiles.conf.j2", fleet).splitlines() if line.startswith("d")]
    agent, workers = role_variables("agent")["__agent_user"], role_variables("gpu_workers")["__gpu_workers_user"]
    assert agent != workers
    owners = {path: owner for _, path, _, owner, _, _ in rules}
    assert owners[fleet["drain_directory"]] == "root"
    assert owners[fleet["down_directory"]] == owners[str(Path(fleet["agent_socket"]).parent)] == agent
    assert all(mode in {"0750", "0755"} for _, _, mode, _, _, _ in rules)

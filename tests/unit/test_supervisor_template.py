# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""The programs that gpu_workers renders, as Supervisor and Gunicorn themselves read them."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import parse_environment, parse_programs
from gunicorn.config import Config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from slot_guard import Settings
from slot_guard.recycling import Wear
from supervisor.options import ServerOptions, UnhosedConfigParser

from tests.templates.render import render, role_variables

SERVICE = {"route": "/tts/", "app": "tts.app:app", "code": {"source": "."}, "conda_env": "tts"}


def fleet(gpu01: dict[str, Any], gateways: tuple[str, ...] = ("10.0.0.100",), **service: Any) -> dict[str, Any]:
    hostvars = {
        "gpu01": {"ansible_host": "10.0.0.1", **gpu01},
        "gpu02": {"ansible_host": "10.0.0.2", "gpu_count": 8},
        **{address: {"ansible_host": address} for address in gateways},
    }
    groups = {"gpu_servers": ["gpu01", "gpu02"], "gateways": list(gateways)}
    derived = derive({"tts": {**SERVICE, **service}}, groups, hostvars, conda_envs={"tts": {"lock": "."}})
    assert derived["faults"] == []
    return derived


@pytest.fixture(scope="module")
def rendered() -> Iterator[Callable[..., str]]:
    """Render the file of gpu01.

    In a process of its own: Ansible finds the filters of a collection only where no import went before it.
    """
    known = {
        "inventory_hostname": "gpu01",
        "conda_env_releases": {"tts": {"path": "/opt/conda/releases/tts/c0ffee"}},
        "service_code_releases": {"tts": {"path": "/opt/gpufleet/tts/releases/f00d", "id": "f00d"}},
        **role_variables("gpu_workers"),
    }
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda fleet, **variables: pool.submit(
            render, "gpu_workers", "gpufleet.conf.j2", fleet, **known, **variables
        ).result()


@pytest.fixture
def programs(rendered: Callable[..., str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Render the file of gpu01 and return what Supervisor makes of it, by program."""

    def read(fleet: dict[str, Any], **variables: Any) -> dict[str, Any]:
        text = rendered(fleet, **variables)
        assert parse_programs(text, "gpufleet-").text == text
        file = tmp_path / "gpufleet.conf"
        # This machine has neither the user nor the directory of the logs.
        file.write_text(text.replace("user = gpufleet", "user = root").replace("/var/log/gpufleet", str(tmp_path)))
        parser = UnhosedConfigParser()
        parser.read(str(file))
        options = ServerOptions()
        groups = [options.processes_from_section(parser, name, name.split(":")[1]) for name in parser.sections()]
        assert not options.parse_warnings
        return {process.name: process for group in groups for process in group}

    return read


def gunicorn_settings(program: Any) -> argparse.Namespace:
    command = shlex.split(program.command)
    assert command[0] == "/opt/conda/releases/tts/c0ffee/bin/gunicorn"
    return Config().parser().parse_args(command[1:])


def test_one_program_per_instance_of_this_host_on_explicit_releases(programs: Callable[..., dict[str, Any]]) -> None:
    made = programs(fleet({"gpu_count": 2}))
    assert list(made) == ["gpufleet-tts-0", "gpufleet-tts-1"]
    for index, program in enumerate(made.values()):
        settings = gunicorn_settings(program)
        assert settings.bind == [f"0.0.0.0:{12321 + index}"]
        assert (settings.worker_class, settings.workers, settings.args) == ("asgi", 1, ["slot_guard.asgi:app"])
        assert settings.forwarded_allow_ips == "*"
        assert program.directory == "/opt/gpufleet/tts/releases/f00d"
        assert program.environment == {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": str(index),
            "HOME": "/var/lib/gpufleet",
            "PYTHONUNBUFFERED": "1",
            "SLOT_GUARD_ADMIN_FROM": "0.0.0.0/0,::/0",
            "SLOT_GUARD_APP": "tts.app:app",
            "SLOT_GUARD_FAILURES": "3",
            "SLOT_GUARD_INSTANCE": f"tts-gpu01-{index}",
            "SLOT_GUARD_SLOTS": "2",
            "SLOT_GUARD_STATE": "/var/lib/gpufleet",
            "SLOT_GUARD_TIME_LIMIT": "315",
            "SLOT_GUARD_VERSION": "f00d",
        }


def test_instances_share_neither_control_socket_nor_log(programs: Callable[..., dict[str, Any]]) -> None:
    made = programs(fleet({"gpu_count": 3})).values()
    assert len({gunicorn_settings(program).control_socket for program in made}) == 3
    assert len({program.stdout_logfile for program in made}) == 3


@pytest.mark.parametrize("seconds", [1, 300, 3600])
def test_a_stop_outlasts_the_longest_request(programs: Callable[..., dict[str, Any]], seconds: int) -> None:
    (program,) = programs(fleet({"gpu_count": 1}, time_limit_seconds=seconds)).values()
    settings = gunicorn_settings(program)
    assert seconds < settings.graceful_timeout < program.stopwaitsecs
    assert settings.timeout > seconds
    assert Settings.from_environment(program.environment).time_limit_seconds == settings.graceful_timeout


def test_killing_takes_the_worker_along_and_stopping_asks_the_master_alone(
    programs: Callable[..., dict[str, Any]],
) -> None:
    (program,) = programs(fleet({"gpu_count": 1})).values()
    assert program.killasgroup
    assert not program.stopasgroup


def test_cards_by_uuid_with_their_own_slots(programs: Callable[..., dict[str, Any]]) -> None:
    cards = [{"device": "GPU-5f0c", "index": 4, "slots": 3}, {"device": "MIG-77aa", "index": 7}]
    made = programs(fleet({"gpus": cards}, slots=1))
    assert list(made) == ["gpufleet-tts-4", "gpufleet-tts-7"]
    seen = [(p.environment["CUDA_VISIBLE_DEVICES"], p.environment["SLOT_GUARD_SLOTS"]) for p in made.values()]
    assert seen == [("GPU-5f0c", "3"), ("MIG-77aa", "1")]


def test_a_service_adds_to_its_environment_whatever_characters_it_needs(
    programs: Callable[..., dict[str, Any]],
) -> None:
    given = {"PROMPT": '100% "你好", ok;#1', "HOME": "/data/models", "EMPTY": ""}
    (program,) = programs(fleet({"gpu_count": 1}, environment=given)).values()
    assert {name: program.environment[name] for name in given} == given


def test_a_queue_reaches_the_guard_and_without_one_the_program_is_the_same(
    programs: Callable[..., dict[str, Any]],
) -> None:
    (program,) = programs(fleet({"gpu_count": 1}, queue=4, queue_timeout_seconds=9)).values()
    told = Settings.from_environment(program.environment)
    assert (told.queue, told.queue_timeout_seconds) == (4, 9)
    (program,) = programs(fleet({"gpu_count": 1}, queue=0, queue_timeout_seconds=9)).values()
    assert not [name for name in program.environment if "QUEUE" in name]


def test_limits_of_recycling_reach_the_guard(programs: Callable[..., dict[str, Any]]) -> None:
    limits = {"memory_limit_megabytes": 9000, "recycle_after_requests": 500, "recycle_after_seconds": 86400}
    made = programs(fleet({"gpu_count": 2}, **limits)).values()
    assert [Settings.from_environment(program.environment).limits for program in made] == [Wear(9000, 500, 86400)] * 2


@settings(max_examples=40)
@given(st.one_of(st.text(), st.dictionaries(st.text(), st.text())))
@example({"text": 'don\'t; say "100%" #1 %(here)s \\ \n\0 你好 🙂'})
@example("'single' and \"double\"")
def test_any_smoke_request_reaches_the_guard_as_it_was_written(rendered: Callable[..., str], body: Any) -> None:
    derived = fleet({"gpu_count": 1}, smoke={"path": "generate?x=%27", "body": body}, failure_limit=5)
    (program,) = parse_programs(rendered(derived), "gpufleet-").programs.values()
    environment = parse_environment(program.options["environment"].replace("%%", "%"))
    told = Settings.from_environment(environment)
    assert told.failure_limit == 5
    assert told.smoke is not None
    assert (told.smoke.path, told.smoke.time_limit_seconds) == ("/tts/generate?x=%27", 300)
    assert told.smoke.method == ("POST" if told.smoke.body else "GET")
    assert (told.smoke.body if isinstance(body, str) else json.loads(told.smoke.body)) == body


def test_supervisor_itself_hands_on_the_smoke_request(programs: Callable[..., dict[str, Any]]) -> None:
    body = {"text": 'don\'t; say "100%" #1 %(here)s 你好'}
    (program,) = programs(fleet({"gpu_count": 1}, smoke={"path": "generate", "body": body})).values()
    told = Settings.from_environment(program.environment)
    assert told.smoke is not None
    assert json.loads(told.smoke.body) == body


@pytest.mark.parametrize(
    ("address", "gateways", "admitted"),
    [
        ("0.0.0.0", ("10.0.0.100", "10.0.0.101"), "10.0.0.100,10.0.0.101,127.0.0.1"),
        ("10.0.0.1", ("10.0.0.100",), "10.0.0.100,10.0.0.1"),
        ("[fd00::1]", ("[fd00::64]",), "fd00::64,fd00::1"),
    ],
)
def test_without_a_firewall_gateways_and_the_roll_out_itself_may_ask_the_guard(
    programs: Callable[..., dict[str, Any]], address: str, gateways: tuple[str, ...], admitted: str
) -> None:
    options = {"gpu_workers_bind_address": address, "gpu_workers_firewall": False}
    (program,) = programs(fleet({"gpu_count": 1}, gateways), **options).values()
    assert program.environment["SLOT_GUARD_ADMIN_FROM"] == admitted
    settings = gunicorn_settings(program)
    assert settings.bind == [f"{address}:12321"]
    assert admitted.startswith(f"{settings.forwarded_allow_ips},")


def test_a_gateway_more_restarts_no_program_behind_a_firewall(programs: Callable[..., dict[str, Any]]) -> None:
    alone, pair = (
        programs(fleet({"gpu_count": 1}, names)) for names in (("10.0.0.100",), ("10.0.0.100", "10.0.0.101"))
    )
    assert [program.environment for program in alone.values()] == [program.environment for program in pair.values()]


def test_a_host_with_an_ipv6_address_listens_there(programs: Callable[..., dict[str, Any]]) -> None:
    (program,) = programs(fleet({"gpu_count": 1, "fleet_address": "fd00::1"})).values()
    assert gunicorn_settings(program).bind == ["[::]:12321"]


def test_logs_rotate_as_the_role_is_told(programs: Callable[..., dict[str, Any]]) -> None:
    (program,) = programs(fleet({"gpu_count": 1}), gpu_workers_log_size="1MB", gpu_workers_log_backups=3).values()
    assert (program.stdout_logfile_maxbytes, program.stdout_logfile_backups) == (1 << 20, 3)
    assert program.redirect_stderr


def test_a_host_without_instances_gets_an_empty_file(rendered: Callable[..., str]) -> None:
    others = fleet({"gpu_count": 1})
    others["instances"] = [instance for instance in others["instances"] if instance["host"] != "gpu01"]
    assert parse_programs(rendered(others), "gpufleet-").programs == {}

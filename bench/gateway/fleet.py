"""The fleets that are measured, derived and rendered as a roll-out does it."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from ansible.template import trust_as_template
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import Program, parse_programs

from bench import PROJECT
from bench.gateway.rendering import files_made, timed_render

ROUTE = "/AIVoice/TTS/CosyVoice2/"
SERVICE = {"route": ROUTE, "app": "bench.gateway.simulated_gpu:app", "code": {"source": "."}, "conda_env": "tts"}
GPUS_PER_HOST = 2
SLOTS = 2
NETWORK = f"127.{16 + os.getpid() % 200}"
"""Several benchmarks and tests may run on one machine at a time: each has a loopback network of its own."""


def fleet(instances: int, port: int, subnet: int = 0, **fields: Any) -> dict[str, Any]:
    """A fleet of so many GPUs on loopback, two a host; `fields` are its service's."""
    hosts: dict[str, dict[str, Any]] = {
        f"gpu{number + 1:02}": {
            "gpu_count": GPUS_PER_HOST,
            "ansible_host": f"{NETWORK}.{subnet + number // 250}.{number % 250 + 1}",
        }
        for number in range(instances // GPUS_PER_HOST)
    }
    groups = {"gpu_servers": list(hosts), "gateways": ["gateway"]}
    variables = {**hosts, "gateway": {"ansible_host": "127.0.0.1"}}
    services = {"cosyvoice2": {**SERVICE, "slots": SLOTS, **fields}}
    derived = derive(services, groups, variables, conda_envs={"tts": {"lock": "."}}, port=port)
    if derived["faults"]:
        raise ValueError("\n".join(derived["faults"]))
    return derived


class Templates:
    """The roles' templates, filled by Ansible in a process of its own.

    Of its own, because Ansible finds the filters of a collection only where no import of it went before.
    """

    def __enter__(self) -> Templates:
        """Start the process."""
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._pool.shutdown()

    def nginx(self, fleet: dict[str, Any]) -> tuple[str, float]:
        """The gateway's configuration, and the seconds that rendering it took."""
        return self._pool.submit(timed_render, "gateway", "nginx.conf.j2", fleet, {}).result()

    def included(self, fleet: dict[str, Any]) -> dict[str, str]:
        """The files that the gateway's configuration includes, by path."""
        return self._pool.submit(files_made, fleet).result()

    def agent(self, fleet: dict[str, Any]) -> str:
        """The configuration of the gateway's agent."""
        text, _ = self._pool.submit(timed_render, "agent", "agent.json.j2", fleet, {}).result()
        return text

    def programs(self, fleet: dict[str, Any], host: str, folder: Path) -> dict[str, Program]:
        """The programs of a host as Supervisor gets them, with their state in `folder`."""
        variables = yaml.safe_load((PROJECT / "roles/gpu_workers/vars/main.yml").read_text())
        known = {
            **{name: trust_as_template(text) if isinstance(text, str) else text for name, text in variables.items()},
            "__gpu_workers_home": str(folder),
            "gpu_workers_bind_address": fleet["hosts"][host]["address"],
            "inventory_hostname": host,
            "conda_env_releases": {"tts": {"path": "/conda"}},
            "service_code_releases": {"cosyvoice2": {"path": str(folder), "id": "bench"}},
        }
        text, _ = self._pool.submit(timed_render, "gpu_workers", "gpufleet.conf.j2", fleet, known).result()
        return dict(parse_programs(text, "gpufleet-").programs)

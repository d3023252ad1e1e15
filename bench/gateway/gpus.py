"""Simulated GPUs as they run on their hosts: one Gunicorn each, started as the roll-out's own template says."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import Program

from bench import PROJECT
from bench.gateway.fleet import Templates
from bench.machine import family
from bench.stats import Event

START_SECONDS = 60
GUARD = "slot_guard.asgi:app"


class Gpus:
    """The GPUs of a fleet; `guarded` ones have the slot guard in front of the app, the others the app alone."""

    def __init__(self, templates: Templates, fleet: dict[str, Any], folder: Path, *, guarded: bool) -> None:
        """Prepare the programs of all hosts; `folder` takes their logs and the ledger."""
        self.instances = fleet["instances"]
        self.slots = fleet["capacity"]
        self._fleet, self._folder, self._templates, self._guarded = fleet, folder, templates, guarded
        self._starts: dict[str, Callable[[], subprocess.Popen[bytes]]] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ledger = folder / "ledger"

    def start(self) -> None:
        """Start all programs; `wait` waits until they serve."""
        self._folder.mkdir()
        self._ledger.touch()
        for host in self._fleet["hosts"]:
            home = self.home(host)
            home.mkdir()
            programs = self._templates.programs(self._fleet, host, home)
            for instance in self.instances:
                if instance["host"] == host:
                    self._starts[instance["id"]] = partial(self._start, programs[instance["program"]], home)
                    self.run(instance["id"])

    def home(self, host: str) -> Path:
        """The folder in which a host's programs run."""
        return self._folder / host

    def run(self, instance: str) -> None:
        """Start a program."""
        self._processes[instance] = self._starts[instance]()

    def _start(self, program: Program, home: Path) -> subprocess.Popen[bytes]:
        command = shlex.split(program.options["command"])[1:]
        if not self._guarded:
            # For gateways that keep connections: else they meet closed ones, and a POST is lost.
            command[command.index(GUARD) :] = ["--keep-alive", "75", self._fleet_app()]
        path = os.pathsep.join(str(PROJECT / place) for place in ("service/guard", "service/tts", "."))
        added = {"PYTHONPATH": path, "BENCH_LEDGER": str(self._ledger)}
        with (home / f"{program.environment['SLOT_GUARD_INSTANCE']}.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *command],
                env={**os.environ, **program.environment, **added},
                cwd=home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until all serve."""
        deadline = time.monotonic() + START_SECONDS
        for instance in self.instances:
            while not _ready(instance["address"], instance["port"], self._guarded):
                ended = any(process.poll() is not None for process in self._processes.values())
                if ended or time.monotonic() > deadline:
                    logs = "\n".join(path.read_text() for path in self._folder.glob("*/*.log"))
                    raise RuntimeError(f"{instance['id']} does not serve:\n{logs[-2000:]}")
                time.sleep(0.05)

    def revive(self) -> None:
        """Start again what has ended by itself, as Supervisor does."""
        for instance, process in list(self._processes.items()):
            if process.poll() is not None and self._processes.get(instance) is process:
                self.run(instance)

    def pids(self, instance: str) -> list[int]:
        """The processes of a program, Gunicorn's master first."""
        return family(self._processes[instance].pid)

    def stop(self, *instances: str) -> None:
        """End these programs when their requests have ended; or all, at once, whoever still has a connection."""
        ending = [self._processes.pop(instance) for instance in instances or list(self._processes)]
        for process in ending:
            process.send_signal(signal.SIGTERM if instances else signal.SIGQUIT)
        for process in ending:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def mark(self) -> int:
        """A place in the ledger, for `events` from there on."""
        return self._ledger.stat().st_size

    def events(self, mark: int) -> list[Event]:
        """What happened on the GPUs since `mark`."""
        with self._ledger.open() as ledger:
            ledger.seek(mark)
            lines = map(json.loads, ledger)
            return [Event(line["monotonic"], line["instance"], line["running"]) for line in lines]

    def _fleet_app(self) -> str:
        (service,) = self._fleet["services"].values()
        app: str = service["app"]
        return app


def _ready(address: str, port: int, guarded: bool) -> bool:
    """Whether a GPU serves: its guard says so, or without one it says anything at all."""
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/_slot_guard/ready")
        return connection.getresponse().status == 200 or not guarded
    except OSError:
        return False
    finally:
        connection.close()

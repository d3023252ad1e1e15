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
from pathlib import Path
from typing import Any

from bench import PROJECT
from bench.gateway.fleet import Templates
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
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ledger = folder / "ledger"

    def start(self) -> None:
        """Start all programs; `wait` waits until they serve."""
        self._folder.mkdir()
        self._ledger.touch()
        for host in self._fleet["hosts"]:
            home = self._folder / host
            home.mkdir()
            for name, program in self._templates.programs(self._fleet, host, home).items():
                command = shlex.split(program.options["command"])[1:]
                if not self._guarded:
                    # For gateways that keep connections: else they meet closed ones, and a POST is lost.
                    command[command.index(GUARD) :] = ["--keep-alive", "75", self._fleet_app()]
                path = os.pathsep.join(str(PROJECT / place) for place in ("service/guard", "service/tts", "."))
                added = {"PYTHONPATH": path, "BENCH_LEDGER": str(self._ledger)}
                with (home / f"{name}.log").open("w") as log:
                    self._processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "gunicorn", *command],
                            env={**os.environ, **program.environment, **added},
                            cwd=home,
                            stdout=log,
                            stderr=log,
                            start_new_session=True,
                        )
                    )

    def wait(self) -> None:
        """Wait until all serve."""
        deadline = time.monotonic() + START_SECONDS
        for instance in self.instances:
            while not _ready(instance["address"], instance["port"]):
                if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                    logs = "\n".join(path.read_text() for path in self._folder.glob("*/*.log"))
                    raise RuntimeError(f"{instance['id']} does not serve:\n{logs[-2000:]}")
                time.sleep(0.05)

    def stop(self) -> None:
        """End all programs at once, whoever still has a connection, and wait until they are gone."""
        for process in self._processes:
            process.send_signal(signal.SIGQUIT)
        for process in self._processes:
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


def _ready(address: str, port: int) -> bool:
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/_slot_guard/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()

"""gpufleet and its rivals, each before GPUs of its own on loopback. Whatever ends there is started again, as Supervisor
and systemd do it; nobody's page is asked, so that all are found whole by the same means: their slots are used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from bench.gateway.contenders import CONTENDERS, GPUFLEET, GPUFLEET_QUEUE, Contender, Gateway, free_port
from bench.gateway.fleet import NETWORK, Templates, fleet
from bench.gateway.gpus import Gpus
from bench.gateway.software import Software
from testbed import PROJECT

from ..background import Background
from ..operations import wait_until
from .stage import GARBAGE, Stage

SERVICE = Path(__file__).with_name("inventory") / "group_vars" / "all" / "faults.yml"
APP = "tests.fleet.faults.service.faulty:app"
FAULTS = "faults"
"""Below the folder in which a host's programs run."""
GPUS = 6

BESIDE = (GPUFLEET, *(contender for contender in CONTENDERS if contender not in (GPUFLEET, GPUFLEET_QUEUE)))


class Loopback(Stage):
    """A contender and its GPUs."""

    def __init__(self, contender: Contender, templates: Templates, folder: Path, software: Software) -> None:
        """Prepare everything below `folder`; the GPUs are started first, they take their time."""
        self.contender = contender
        self._ledger = folder / "gpus" / "ledger"
        (described,) = yaml.safe_load(SERVICE.read_text())["services"].values()
        environment = {**described["environment"], "TTS_LEDGER": str(self._ledger), "SIMULATED_FAULTS": FAULTS}
        service = {**described, "app": APP, "environment": environment}
        derived = fleet(GPUS, free_port(), BESIDE.index(contender), base_port=free_port(), **service)
        clients = [f"{NETWORK}.200.{last}" for last in range(1, 21)]
        super().__init__(derived, derived["gateways"][0]["url"], clients)
        self.gpus = Gpus(templates, derived, folder / "gpus", guarded=not contender.rival)
        self._templates = templates
        self._gateway = Gateway(contender, derived, folder / "gateway", software)

    @contextmanager
    def up(self) -> Iterator[None]:
        """Have its gateway run for the length of a block, before GPUs that were started."""
        self.gpus.wait()
        self._gateway.write(self._templates)
        with ExitStack() as stack:
            stack.callback(self._gateway.stop)
            self._gateway.start()
            if not self.contender.rival:
                stack.enter_context(self._companions())
            stack.enter_context(Supervision(self.gpus, self._gateway))
            yield

    @contextmanager
    def _companions(self) -> Iterator[None]:
        """What runs beside gpufleet's nginx: the agent, and the renewal of the counts."""
        folder = self._gateway.folder
        configuration = folder / "agent.json"
        configuration.write_text(self._gateway.moved(self._templates.agent(self.fleet)))
        zones, pid_file = folder / "run/gpufleet-gateway/zones", folder / "run/nginx.pid"
        watched = ["--log", folder / "error.log", "--zones", zones, "--pid-file", pid_file]
        with ExitStack() as stack, (folder / "agent.log").open("w") as log:
            for module, *options in (("fleet_agent", "--config", configuration), ("fleet_agent.renewal", *watched)):
                command = [sys.executable, "-m", module, *options]
                place = PROJECT / "service" / "agent"
                process = stack.enter_context(subprocess.Popen(command, cwd=place, stdout=log, stderr=log))
                stack.callback(process.terminate)
            yield

    # What a row does

    def reload_gateway(self) -> None:
        self._gateway.begin_reload()

    def kill_gateway_workers(self, most: int | None = None) -> None:
        self._kill_gateway(self._gateway.pids[1:][:most])

    def cut_gateway_power(self) -> None:
        self._kill_gateway(self._gateway.pids)

    def _kill_gateway(self, killed: Sequence[int]) -> None:
        with self.strike():
            kill(killed, signal.SIGKILL)
            wait_until(lambda: not set(killed) & set(self._gateway.pids) and self._gateway.serves, 20)

    def kill_worker(self, instance: dict[str, Any]) -> None:
        kill(self.gpus.pids(instance["id"])[1:], signal.SIGKILL)

    def kill_master(self, instance: dict[str, Any]) -> None:
        kill(self.gpus.pids(instance["id"])[:1], signal.SIGKILL)

    def sick(self, host: str, gpu: int, fault: str) -> AbstractContextManager[None]:
        file = self.gpus.home(host) / FAULTS / self.instance(host, gpu)["device"]
        file.parent.mkdir(exist_ok=True)
        return self.broken(lambda: file.write_text(fault), file.unlink)

    @contextmanager
    def garbled(self, host: str, gpu: int) -> Iterator[None]:
        target = self.instance(host, gpu)
        server = [sys.executable, "-c", GARBAGE.format(**target)]
        with (
            self.broken(lambda: self.gpus.stop(target["id"]), lambda: self.gpus.run(target["id"])),
            subprocess.Popen(server, stderr=subprocess.DEVNULL) as garbage,
        ):
            try:
                yield
            finally:
                garbage.kill()

    def frozen(self, host: str) -> AbstractContextManager[None]:
        def send(number: signal.Signals) -> None:
            kill([pid for instance in self.instances(host) for pid in self.gpus.pids(instance)], number)

        return self.broken(lambda: send(signal.SIGSTOP), lambda: send(signal.SIGCONT))

    def wait_until_out(self, *instances: str) -> None:
        """Return at once: what is sent there from now on is nobody's fault but the gateway's."""

    # What is asked after a row

    def ledger(self) -> list[str]:
        return self._ledger.read_text().splitlines()

    def states(self) -> dict[str, str]:
        """Whatever it may be: slots are probed without being told."""
        return dict.fromkeys(self.slots, "ready")

    def idle_and_ready(self) -> bool:
        return True

    def restart(self) -> None:
        self._gateway.stop()
        self._gateway.start()
        self.gpus.wait()


class Supervision(Background):
    """Starts again whatever has ended, for the length of a `with` block."""

    def __init__(self, *supervised: Gpus | Gateway) -> None:
        """Look after these."""
        super().__init__()
        self._supervised = supervised

    def work(self) -> None:
        while not self.ending.wait(0.1):
            for programs in self._supervised:
                programs.revive()


def kill(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to processes that may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def beside() -> Iterator[list[Loopback]]:
    """All contenders, up for the length of a block."""
    software = Software()
    # A short path, because a socket's has 107 characters at most; one that nginx's workers, another user, can walk.
    with tempfile.TemporaryDirectory(prefix="faults-", dir="/tmp") as name, Templates() as templates, ExitStack() as up:
        folder = Path(name)
        folder.chmod(0o755)
        stages = []
        for number, contender in enumerate(BESIDE):
            place = folder / str(number)
            place.mkdir()
            stages.append(Loopback(contender, templates, place, software))
        for stage in stages:
            up.callback(stage.gpus.stop)
            stage.gpus.start()
        for stage in stages:
            up.enter_context(stage.up())
        yield stages

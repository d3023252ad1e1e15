"""Who is measured: each contender's configuration, and its process."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.gateway.fleet import ROUTE, Templates
from bench.gateway.software import Software
from bench.machine import family

RIVALS = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "rivals"),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


RELOAD_SECONDS = 60


@dataclass(frozen=True)
class Contender:
    """A way to share GPUs: gpufleet with its guards, or a `rival`'s configuration in front of the bare app."""

    name: str
    rival: str = ""
    program: str = "nginx"
    queue: int = 0
    """Requests that wait beyond those that run."""
    service: Mapping[str, Any] = field(default_factory=dict)
    """Fields of gpufleet's service that differ from their defaults."""


GPUFLEET = Contender("gpufleet")
GPUFLEET_QUEUE = Contender("gpufleet, queue", queue=12, service={"queue": 2})
CONTENDERS = (
    Contender("article", "article.conf.j2"),
    Contender("one-tier nginx", "one_tier.conf.j2"),
    Contender("HAProxy", "haproxy.cfg.j2", "haproxy", queue=12),
    GPUFLEET,
    GPUFLEET_QUEUE,
)


def free_port() -> int:
    """A TCP port that nobody listens at, below those that the kernel gives to clients."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


class Gateway:
    """A contender's process with the configuration for a fleet, all of its files in one folder."""

    def __init__(self, contender: Contender, fleet: dict[str, Any], folder: Path, software: Software) -> None:
        """Prepare; `write` comes next, then `start`."""
        self.contender, self.fleet, self.folder = contender, fleet, folder
        self.port: int = fleet["port"]
        self.render_seconds: float | None = None
        self._software = software
        self._configuration = folder / contender.rival.removesuffix(".j2") if contender.rival else folder / "nginx.conf"
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("run/gpufleet-gateway/zones", "run/gpufleet-agent/down", "var/lib/gpufleet-gateway/drain"):
            (folder / name).mkdir(parents=True)

    def write(self, templates: Templates) -> None:
        """Write the configuration."""
        temporary = "\n    ".join(
            f"{kind}_temp_path {self.folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
        )
        if self.contender.rival:
            (service,) = self.fleet["services"].values()
            text = RIVALS.get_template(self.contender.rival).render(
                **self.fleet,
                folder=self.folder,
                temporary=temporary,
                route=ROUTE,
                client_limit=service["client_limit"],
                queue=self.contender.queue,
            )
        else:
            text, self.render_seconds = templates.nginx(self.fleet)
            text = self.moved(text).replace("http {\n", f"http {{\n    {temporary}\n", 1)
            for path, content in templates.included(self.fleet).items():
                Path(self.moved(path)).write_text(content)
        self._configuration.write_text(text)

    def moved(self, text: str) -> str:
        """The text of a configuration with the paths of a host moved below the folder."""
        for path in ("/run/", "/var/lib/gpufleet-gateway"):
            text = text.replace(path, f"{self.folder}{path}")
        return text.replace("/var/log/nginx", str(self.folder))

    @property
    def configuration_bytes(self) -> int:
        """Size of the configuration."""
        return self._configuration.stat().st_size

    def check(self) -> float:
        """Have the program validate its configuration; return the seconds that took."""
        option = "-c" if self.contender.program == "haproxy" else "-t"
        began = time.perf_counter()
        done = subprocess.run([*self._call, option], capture_output=True, env=self._software.environment)
        seconds = time.perf_counter() - began
        if done.returncode != 0:
            raise RuntimeError(f"{self.contender.name}: {done.stderr.decode()[-2000:]}")
        return seconds

    def start(self) -> None:
        """Start and wait until it listens and has workers: before these, a signal to reload would end it."""
        for left in self.folder.glob("run/gpufleet-gateway/*.sock"):  # by one that was killed; so does its systemd unit
            left.unlink()
        foreground = ["-W"] if self.contender.program == "haproxy" else ["-g", "daemon off;"]
        with (self.folder / "output.log").open("w") as output:
            process = self._process = subprocess.Popen(
                [*self._call, *foreground], stdout=output, stderr=output, env=self._software.environment
            )
        while not self._serves(process.pid):
            if process.poll() is not None:
                raise RuntimeError(f"{self.contender.name}: {(self.folder / 'output.log').read_text()[-2000:]}")
            time.sleep(0.01)

    def revive(self) -> None:
        """Start it again if it has ended by itself, as systemd does."""
        process = self._process
        if process is not None and process.poll() is not None and self._process is process:
            self.start()

    def begin_reload(self) -> None:
        """Have it take its configuration over again."""
        self._running.send_signal(signal.SIGUSR2 if self.contender.program == "haproxy" else signal.SIGHUP)

    def reload(self) -> float:
        """Likewise; return the seconds until new workers run in place of the old, when these have ended."""
        old = set(self.pids[1:])
        began = time.perf_counter()
        self.begin_reload()
        while len(set(self.pids[1:]) - old) < len(old):
            self._not_later_than(began, RELOAD_SECONDS)
        seconds = time.perf_counter() - began
        while old & set(self.pids):
            self._not_later_than(began, RELOAD_SECONDS)
        return seconds

    def stop(self) -> None:
        """End it and wait until it is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _not_later_than(self, began: float, seconds: float) -> None:
        if time.perf_counter() - began > seconds:
            raise RuntimeError(f"{self.contender.name} still has not done in {seconds} s what it was told")
        time.sleep(0.001)

    @property
    def serves(self) -> bool:
        """Whether it listens and has workers."""
        return self._serves(self._running.pid)

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return family(self._running.pid)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.contender.name} was not started")
        return self._process

    @property
    def _call(self) -> list[str]:
        program = self._software[self.contender.program]
        if self.contender.program == "haproxy":
            return [program, "-f", str(self._configuration)]
        return [program, "-e", f"{self.folder}/error.log", "-c", str(self._configuration)]

    def _serves(self, pid: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0 and len(family(pid)) > 1

"""The Docker engine of this machine: the one that answers, else the distribution's, started here and stopped here.

An engine found running belongs to somebody else and is never stopped.
"""

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from testbed import PROJECT
from testbed.shell import CommandFailed, environment, provide, run

DEFAULT_ADDRESS = "unix:///var/run/docker.sock"
START_SECONDS = 60
STOP_SECONDS = 30


class EngineFailed(RuntimeError):
    """There is no engine and none can be started; the message says why."""


@dataclass(frozen=True)
class Engine:
    """An engine at `address` (a unix:// URL); `state` is the folder that remembers the one started here.

    `data` and `runtime` are dockerd's own folders: images and containers, and what a reboot may lose.
    `options` are further options of dockerd.
    """

    address: str = DEFAULT_ADDRESS
    state: Path = PROJECT / ".cache" / "engine"
    data: Path = Path("/var/lib/docker")
    runtime: Path = Path("/var/run/docker")
    options: tuple[str, ...] = ()

    def docker(self, *arguments: str, send: bytes = b"", seconds: float = 300) -> str:
        """Run a docker command against this engine and return what it printed."""
        return run("docker", "--host", self.address, *arguments, send=send, seconds=seconds)

    def answers(self) -> bool:
        """Tell whether an engine answers at the address, whoever started it."""
        try:
            # An engine that is absent gives the client's half of the answer and, before Docker 23, status 0.
            return self.docker("info", "--format", "{{.ServerVersion}}", seconds=20).strip() != ""
        except CommandFailed:
            return False

    def start(self) -> bool:
        """Have an engine answer; True where one had to be started."""
        if self.answers():
            return False
        if not self.address.startswith("unix://"):
            raise EngineFailed(f"DOCKER_HOST={self.address} does not answer, and only a unix socket is started here")
        provide({"dockerd": "docker.io", "docker": "docker.io", "iptables": "iptables"})
        self.state.mkdir(parents=True, exist_ok=True)
        self._forget_dead_processes()
        log = self.state / "dockerd.log"
        pid = self._spawn(log)
        self._mark.write_text(json.dumps({"pid": pid, "started": _process(pid)[1]}))
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if _process(pid)[0] is None or time.monotonic() > deadline:
                self.stop()
                last_words = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise EngineFailed(f"dockerd does not answer at {self.address}; the end of {log}:\n{last_words}")
            time.sleep(0.2)
        return True

    def started_here(self) -> int | None:
        """Return the process id of the engine that was started here and still runs."""
        try:
            mark = json.loads(self._mark.read_text())
        except FileNotFoundError:
            return None
        return mark["pid"] if _process(mark["pid"]) == ("dockerd", mark["started"]) else None

    def stop(self) -> bool:
        """Stop the engine that was started here, with its containers; True where there was one."""
        pid = self.started_here()
        self._mark.unlink(missing_ok=True)
        if pid is None:
            return False
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while _process(pid)[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                deadline += STOP_SECONDS
            time.sleep(0.1)
        return True

    def idle(self) -> bool:
        """Tell whether no container runs in the engine."""
        return self.docker("ps", "--quiet").strip() == ""

    def _spawn(self, log: Path) -> int:
        """Start dockerd and return its process id."""
        variables = environment()
        program = shutil.which("dockerd", path=variables["PATH"]) or "dockerd"
        arguments = ["--host", self.address, "--data-root", str(self.data), "--exec-root", str(self.runtime)]
        arguments += ["--pidfile", str(self._pid_file), *self.options]
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        # A session of its own: an interrupt at the terminal is not for the engine.
        return os.posix_spawn(program, ["dockerd", *arguments], variables, file_actions=actions, setsid=True)

    @property
    def _pid_file(self) -> Path:
        return self.state / "dockerd.pid"

    @property
    def _mark(self) -> Path:
        return self.state / "started.json"

    def _forget_dead_processes(self) -> None:
        """Remove the pid files of a killed engine: dockerd would wait for whatever process has that number by now."""
        containerd = self.runtime / "containerd" / "containerd.pid"
        for file, name in ((self._pid_file, "dockerd"), (containerd, "containerd")):
            if file.exists() and _process(file.read_text().strip())[0] != name:
                file.unlink()


def this_machine() -> Engine:
    """Return the engine that the docker client of this environment talks to."""
    return Engine(address=os.environ.get("DOCKER_HOST", DEFAULT_ADDRESS))


def _process(pid: int | str) -> tuple[str, str] | tuple[None, None]:
    """Return a running process's name and start time (clock ticks since boot); Nones where it has ended, reaped or not.

    A process id is used again, after a reboot above all; together with the start time it is not.
    """
    try:
        # The name is in parentheses and may hold some: the fields that follow begin behind the last one, proc(5).
        head, _, tail = Path("/proc", str(pid), "stat").read_text().rpartition(")")
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return None, None
    state, *fields = tail.split()
    return (None, None) if state == "Z" else (head.partition("(")[2], fields[18])

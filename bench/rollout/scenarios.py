"""What is measured of the contenders: a run that has nothing to change, and adding a host."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import PROJECT
from bench.rollout.contenders import CONTENDERS, GPUFLEET, PYINFRA, STOCK, Contender, Unexpected
from bench.rollout.fleet import FOLDER, Fleet, Size

LIMIT_SECONDS = 600
SETTLE_SECONDS = 30
IDLE_SECONDS = 5

Figures = dict[str, dict[str, list[float]]]
"""By contender and measure, a figure for each round."""
Results = dict[str, Figures]
"""By scenario."""


ARTICLE = Size("four", 3, 2, "172.31.96")
TWENTY = Size("twenty", 20, 1, "172.31.97")


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    small: Size = ARTICLE
    large: Size = TWENTY
    rounds: int = 3
    slowest_rounds: int = 2
    """Rounds of the slowest contender on the large fleet, whose noise is the least."""
    minutes: float = 30
    """No scenario begins later: a busy machine gets fewer rounds."""

    def takes_part(self, contender: Contender, size: Size, turn: int) -> bool:
        """Tell whether a contender is measured on a fleet in this round."""
        return contender is not STOCK or size == self.small or turn < self.slowest_rounds


QUICK = Extent(Size("quick-four", 1, 2, "172.31.96"), Size("quick-twenty", 2, 1, "172.31.97"), rounds=1)


@dataclass(frozen=True)
class Run:
    """What a run took."""

    seconds: float
    serving: float | None
    """Seconds until what was waited for came about."""
    controller_cpu: float
    changes: int


def run(
    contender: Contender,
    command: Sequence[str],
    until: Callable[[], bool] | None = None,
) -> Run:
    """Run a contender's command line to its end; look for `until` meanwhile, and after it if need be."""
    log = FOLDER / f"{contender.name.replace(' ', '-')}.log"
    with _connections() as connections, log.open("w+") as output:
        settings = {"ANSIBLE_SSH_CONTROL_PATH_DIR": str(connections), "PYTHONUNBUFFERED": "1"}
        environment = {**os.environ, **settings, **contender.environment()}
        begin = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        serving = ended = usage = changes = None
        try:
            while ended is None or (until and serving is None):
                time.sleep(0.05)
                elapsed = time.monotonic() - begin
                if until and serving is None and until():
                    serving = time.monotonic() - begin
                if ended is None:
                    pid, _, spent = os.wait4(process.pid, os.WNOHANG)
                    if pid:
                        ended, usage = time.monotonic() - begin, spent
                        output.seek(0)
                        changes = contender.changes(output.read())
                if elapsed > (LIMIT_SECONDS if ended is None else ended + SETTLE_SECONDS):
                    raise Unexpected(f"{contender.name} did not get there in {elapsed:.0f} s; see {log}")
        finally:
            if ended is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        assert usage and changes is not None
        return Run(ended, serving, usage.ru_utime + usage.ru_stime, changes)


@contextmanager
def _connections() -> Iterator[Path]:
    """A folder for the connections that a run of Ansible keeps: none was there before, none stays."""
    with tempfile.TemporaryDirectory(prefix="cp-", dir="/tmp") as folder:  # a socket's path has 107 characters at most
        try:
            yield Path(folder)
        finally:
            for socket in Path(folder).iterdir():
                subprocess.run(["ssh", "-O", "exit", "-o", f"ControlPath={socket}", "any"], capture_output=True)


class Course:
    """The contenders on one fleet, measure by measure."""

    def __init__(self, fleet: Fleet) -> None:
        """Roll out from bare hosts, and have everything that contenders need."""
        self.fleet = fleet
        self.from_bare = self._expect(GPUFLEET, self.fleet.instances, changes=True).seconds
        self.idle = 0.0
        self._before: dict[str, str] = {}
        PYINFRA.prepare(fleet)

    def rest(self) -> None:
        """Measure what the hosts use while nothing is rolled out."""
        before = self.fleet.cpu_seconds()
        time.sleep(IDLE_SECONDS)
        self.idle = (self.fleet.cpu_seconds() - before) / IDLE_SECONDS

    def unchanged(self, contender: Contender) -> dict[str, float]:
        """Roll out what is there already."""
        return self._measured(contender, [], changes=False)

    def add(self, contender: Contender, limit: Sequence[str] = ()) -> dict[str, float]:
        """Bring the newest host, a bare machine, into the fleet that runs without it."""
        newest = [name for name in self.fleet.instances if f"-{self.fleet.newest}-" in name]
        if not self._before:
            command = GPUFLEET.command(self.fleet, ["gateways"])
            command[command.index(str(self.fleet.inventory))] = str(self.fleet.inventory_before)
            run(GPUFLEET, command)
            self._before = self.fleet.read_gateway()
        self.fleet.put_back_gateway(self._before)
        self.fleet.renew_newest()
        if self.fleet.serves(*newest):
            raise Unexpected(f"{newest} are in the fleet, and should not be yet")
        return self._measured(contender, newest, changes=True, limit=limit)

    def _measured(
        self, contender: Contender, wait_for: list[str], changes: bool, limit: Sequence[str] = ()
    ) -> dict[str, float]:
        before = self.fleet.cpu_seconds()
        done = self._expect(contender, wait_for, changes, limit)
        spent = self.fleet.cpu_seconds() - before - self.idle * done.seconds
        figures = {"seconds": done.seconds, "host_cpu": spent, "controller_cpu": done.controller_cpu}
        return figures if done.serving is None else {"serving": done.serving, **figures}

    def _expect(self, contender: Contender, wait_for: list[str], changes: bool, limit: Sequence[str] = ()) -> Run:
        until = (lambda: self.fleet.serves(*wait_for)) if wait_for else None
        done = run(contender, contender.command(self.fleet, limit), until)
        if bool(done.changes) != changes:
            raise Unexpected(f"{contender.name} changed {done.changes}, {'some' if changes else 'none'} expected")
        return done


def measure(small: Fleet, large: Fleet, extent: Extent, tell: Callable[[str], None]) -> Results:
    """All scenarios, all contenders in turn, in another order every round."""
    results: Results = {}
    began = time.monotonic()
    courses = {fleet: Course(fleet) for fleet in (small, large)}
    results["from bare"] = {
        GPUFLEET.name: {fleet.size.name: [round(course.from_bare, 3)] for fleet, course in courses.items()}
    }
    steps: Mapping[str, tuple[Fleet, Callable[[Contender], dict[str, float]]]] = {
        "unchanged, large": (large, courses[large].unchanged),
        "add, limited": (large, lambda one: courses[large].add(one, [large.newest, "gateways"])),
        "unchanged, small": (small, courses[small].unchanged),
        "add": (large, courses[large].add),
    }
    for turn in range(extent.rounds):
        order = [*CONTENDERS[turn % len(CONTENDERS) :], *CONTENDERS[: turn % len(CONTENDERS)]]
        for course in courses.values():
            course.rest()
        for name, (fleet, step) in steps.items():
            if time.monotonic() - began > extent.minutes * 60:
                return results
            figures = results.setdefault(name, {one.name: defaultdict(list) for one in CONTENDERS})
            for contender in order:
                if extent.takes_part(contender, fleet.size, turn):
                    measured = {measure: round(figure, 3) for measure, figure in step(contender).items()}
                    tell(f"round {turn + 1}, {name}: {contender.name} {measured}")
                    for measure, figure in measured.items():
                        figures[contender.name][measure].append(figure)
    return results

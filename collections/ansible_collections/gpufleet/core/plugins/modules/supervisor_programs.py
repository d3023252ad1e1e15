#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Ansible module: Supervisor runs exactly the programs of one file, and each of them answers ready."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import stat
import time
import xmlrpc.client
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.instances import Instance
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import (
    Changes,
    Program,
    ProgramFile,
    compare,
    describe,
    parse_programs,
)
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_rpc import Process, ProgramsError, Supervisor
from ansible_collections.gpufleet.core.plugins.module_utils.system_files import (
    SECRET_MODE,
    Texts,
    differences,
    read,
    write,
)

DOCUMENTATION = r"""
module: supervisor_programs
short_description: Run exactly the programs of one Supervisor file
description:
  - Writes the file, then adds, restarts and removes only the programs whose sections differ; every other program keeps
    its processes. supervisord itself is never restarted, only started where it does not run.
  - A removed or changed program is stopped and proved gone before anything takes its place.
  - Ends with every program RUNNING or, where it has a port in O(ready_ports), answering 200 there. One that was touched
    and has a request in O(smoke) has answered that too, or refused it because its slots are all taken. A program that
    does not get there is put back on its previous section, or taken out where it is new; the others stay as wanted.
  - With O(replace) only the named programs are stopped. All others that would be, with whatever waits for their card
    or port, are reported as RV(pending) and left as they run, in the file too.
options:
  path:
    description: File of programs that Supervisor's own configuration includes. Its directory must exist.
    type: path
    required: true
  content:
    description: The whole file. Nothing but C([program:…]) sections whose names begin with O(prefix).
    type: str
    required: true
  prefix:
    description: How the names of all programs of the file begin, and of no program elsewhere.
    type: str
    default: gpufleet-
  ready_ports:
    description: TCP port by program. The program is up once O(ready_path) answers 200 there.
    type: dict
    default: {}
  ready_address:
    description: Address of this host to ask at.
    type: str
    default: 127.0.0.1
  ready_path:
    description: HTTP path to ask. An answer with a JSON C(state) of V(failed) ends the wait at once.
    type: str
    default: /_slot_guard/ready
  ready_timeout:
    description: Seconds within which all programs must be ready. Models load for minutes.
    type: int
    default: 900
  smoke:
    description:
      - By program, a request that it must answer with 2xx after it was added, restarted or put up again - C(path),
        C(body) (empty means GET) and C(content_type), sent to its port in O(ready_ports) - within C(timeout) seconds.
    type: dict
    default: {}
  replace:
    description:
      - The programs that may be stopped in this run, to be replaced or removed. An empty list stops none.
      - Left out, all may be.
    type: list
    elements: str
  restart:
    description: Programs of the file to be replaced though their sections are the same. O(replace) may hold them back.
    type: list
    elements: str
    default: []
  socket:
    description: The Unix socket of supervisord.
    type: path
    default: /run/supervisor.sock
  service:
    description: The systemd service to enable and start where nothing answers at O(socket).
    type: str
    default: supervisor
  files:
    description: Texts of files that the programs read, by path. They are there before a program is started.
    type: dict
    default: {}
  service_override:
    description: Text of a systemd drop-in for O(service), named like O(path), such as how long its stop may take.
    type: str
author: gpufleet contributors
"""

EXAMPLES = r"""
- name: Run one program per instance
  gpufleet.core.supervisor_programs:
    path: /etc/supervisor/conf.d/gpufleet.conf
    content: "{{ lookup('ansible.builtin.template', 'gpufleet.conf.j2') }}"
    ready_ports:
      gpufleet-cosyvoice2-0: 12321
"""

RETURN = r"""
added:
  description: Programs that are new.
  returned: success
  type: list
  elements: str
restarted:
  description: Programs that were restarted because their sections changed, or because O(restart) names them.
  returned: success
  type: list
  elements: str
removed:
  description: Programs that were stopped and removed.
  returned: success
  type: list
  elements: str
started:
  description: Unchanged programs that were not running.
  returned: success
  type: list
  elements: str
pending:
  description:
    - What O(replace) kept from happening, as a list of C(program), C(change) (changed, restart, leaving or added),
      C(instance), C(port), and the versions C(from) and C(to). The port is that of what runs now, where it does; the
      instance is called as it is to be, where it stays.
  returned: success
  type: list
  elements: dict
seconds:
  description: How long it took to C(stop) programs and until the last one was C(ready), its smoke request included.
  returned: success, where programs were touched
  type: dict
programs:
  description: State and pid of each program by name, where supervisord runs.
  returned: always
  type: dict
"""

POLL_SECONDS = 0.25
#: How long one instance may take to answer while the import of a model holds its interpreter.
ASK_TIMEOUT_SECONDS = 5.0
#: What the kernel gets to end a process after SIGKILL; the GPU driver frees gigabytes in it.
KILL_SECONDS = 20
#: Beyond a program's startsecs, until it must have reached RUNNING.
START_MARGIN_SECONDS = 10
SERVICE_START_SECONDS = 15
LOG_TAIL_LINES = 30
LOG_TAIL_BYTES = 16_384

# Supervisor's own defaults, its configuration reference.
DEFAULT_STARTSECS = 1
DEFAULT_STOPWAITSECS = 10

STARTED_STATES = frozenset({"STARTING", "RUNNING"})
STOPPED_STATES = frozenset({"STOPPED", "EXITED", "FATAL", "UNKNOWN"})


@dataclass(frozen=True)
class Readiness:
    """How to ask programs whether they are ready: at ``address``, path ``path``, ``ports`` by program.

    ``smoke`` is by program the request that it must answer with 2xx once it is ready, as the module's option.
    """

    ports: Mapping[str, int]
    address: str = "127.0.0.1"
    path: str = "/_slot_guard/ready"
    timeout: float = 900
    smoke: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def ask(self, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Ask programs, all at a time. Return by name ``ready``, ``failed`` or ``waiting``, and what was answered."""
        return side_by_side(self._ask, names)

    def try_out(self, names: Iterable[str]) -> dict[str, str]:
        """Send programs their smoke requests, all at a time. Return by program that failed what it answered."""
        answers = side_by_side(self._try_out, names)
        return {name: f"its smoke request failed: {answer}" for name, answer in answers.items() if answer}

    def _try_out(self, name: str) -> str:
        request = self.smoke[name]
        # One that was not drained serves since it is ready, which a guard is only after a good answer to this request.
        return Instance(name, self.address, self.ports[name]).try_out(request, float(request["timeout"]), True)

    def _ask(self, name: str) -> tuple[str, str]:
        connection = http.client.HTTPConnection(self.address, self.ports[name], timeout=ASK_TIMEOUT_SECONDS)
        try:
            connection.request("GET", self.path)
            response = connection.getresponse()
            body = response.read(LOG_TAIL_BYTES).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException) as error:
            return "waiting", f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        answer = f"HTTP {response.status} {body}"
        if response.status == http.client.OK:
            return "ready", answer
        with contextlib.suppress(ValueError):
            status = json.loads(body)
            if isinstance(status, dict) and status.get("state") == "failed":
                return "failed", answer
        return "waiting", answer


@dataclass(frozen=True)
class Plan:
    """What a run does to the programs of a host, from their file as it is wanted and as it is; touches nothing."""

    wanted: ProgramFile
    present: ProgramFile
    #: None permits everything, an empty collection what stops no program, else what concerns these programs.
    only: Collection[str] | None = None
    #: Programs that are replaced though their sections are the same.
    restart: Collection[str] = ()

    def permitted(self, changes: Changes) -> Changes:
        """Return the part of ``changes`` that the run may make."""
        return Changes(
            added=[name for name in changes.added if self.concerns(name)],
            changed=[name for name in changes.changed if self.may_stop(name)],
            removed=[name for name in changes.removed if self.may_stop(name)],
        )

    def concerns(self, name: str) -> bool:
        """Tell whether the run looks after a program: starts it, and waits for it."""
        return not self.only or name in self.only

    def may_stop(self, name: str) -> bool:
        """Tell whether the run may stop a program."""
        return self.only is None or name in self.only

    @cached_property
    def held(self) -> frozenset[str]:
        """The programs that must stay as they are and run: those not permitted to change, and who follows them.

        A new program whose port is still in use, or whose card is about to be left by another one, waits for that.
        """
        changes = compare(self.present, self.wanted).with_restarts(self.restart)
        may = self.permitted(changes)
        held = changes.names - may.names
        staying = [self.present.programs[name] for name in held if name in self.present.programs]
        ports = {program.port for program in staying} - {None}
        cards = {card(self.present.programs[name]) for name in held.intersection(changes.removed)} - {None}
        newcomers = {name: self.wanted.programs[name] for name in may.added}
        return held | {name for name, program in newcomers.items() if program.port in ports or card(program) in cards}

    @cached_property
    def target(self) -> ProgramFile:
        """The file as the run leaves it."""
        return self.wanted.put_back(self.held, self.present)

    @cached_property
    def changes(self) -> Changes:
        """What the run does, as far as the files tell."""
        return compare(self.present, self.target).with_restarts(set(self.restart) - self.held)

    @cached_property
    def concerned(self) -> list[str]:
        """The programs that must be up in the end."""
        return [name for name in self.target.programs if name not in self.held and self.concerns(name)]

    @property
    def patience(self) -> int:
        """Seconds in which any program of the two files must have ended, SIGKILL included."""
        programs = [program for file in (self.wanted, self.present) for program in file.programs.values()]
        waits = [program.seconds("stopwaitsecs", DEFAULT_STOPWAITSECS) for program in programs]
        return max(waits, default=DEFAULT_STOPWAITSECS) + KILL_SECONDS

    def pending(self, held: Iterable[str]) -> list[dict[str, Any]]:
        """Describe programs that wait to be replaced, removed or added, as the module returns them."""
        differing = compare(self.present, self.wanted)
        restarted = set(self.restart) - differing.names
        entries = []
        for name in sorted(held):
            old, new = self.present.programs.get(name), self.wanted.programs.get(name)
            # A program that only supervisord still knows is in no file: nothing is known of it but its name.
            old_environment, new_environment = (program.environment if program else {} for program in (old, new))
            known = new_environment or old_environment  # so the gateways know it, where its host was renamed
            change = "restart" if name in restarted else "leaving" if not new else "changed" if old else "added"
            entries.append(
                {
                    "program": name,
                    "change": change,
                    "instance": known.get("SLOT_GUARD_INSTANCE"),
                    "port": old.port if old else None,
                    "from": old_environment.get("SLOT_GUARD_VERSION"),
                    "to": new_environment.get("SLOT_GUARD_VERSION"),
                }
            )
        return entries


def card(program: Program) -> str | None:
    """Return the GPU that a program sees, or None where it has no card of its own."""
    return program.environment.get("CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Host:
    """Brings the programs of one host from one file to another."""

    path: Path
    supervisor: Supervisor
    readiness: Readiness
    warn: Callable[[str], None]

    def apply(self, plan: Plan) -> tuple[Changes, Changes]:
        """Write the file and replace the programs that differ.

        :returns: what was done, and what there was to do.
        :raises ProgramsError: supervisord refuses the file, which is then the old one again, or a program does not end.
        """
        before = read(self.path)
        make_log_directories(plan.target)
        if not is_private(self.path, plan.target.text):
            write(self.path, plan.target.text, SECRET_MODE)
        try:
            found = self.supervisor.reread().with_restarts(plan.restart)
        except ProgramsError as error:
            write(self.path, before, SECRET_MODE)
            raise ProgramsError(f"{error}. {self.path} was left as it was; nothing was stopped.") from error
        changes = plan.permitted(found)
        leaving = [*changes.changed, *changes.removed]
        self._stop(leaving, plan.patience)
        for name in leaving:
            self.supervisor.remove(name)
        # Only now: a newcomer may take over a port, or the memory of a card, from one that left.
        for name in [*changes.changed, *changes.added]:
            self.supervisor.add(name)
        return changes, found

    def _stop(self, names: list[str], patience: float) -> None:
        """Stop programs, all at a time, and prove that nothing of them runs."""
        groups = {name: process.pid for name, process in self.supervisor.processes().items()}
        for name in names:
            self.supervisor.stop(name)
        deadline = time.monotonic() + patience
        waiting = list(names)
        while waiting:
            states = {name: process.state for name, process in self.supervisor.processes().items()}
            for name in [name for name in waiting if states.get(name, "STOPPED") in STOPPED_STATES]:
                left = kill_group(groups[name])
                if left:
                    self.warn(f"{name} had left processes behind, which were killed: {left}")
                waiting.remove(name)
            if waiting and time.monotonic() > deadline:
                pids = ", ".join(f"{name} (pid {groups[name]})" for name in waiting)
                raise ProgramsError(
                    f"{pids}: still there {patience:.0f} s after the order to stop, SIGKILL included. "
                    "A process that waits for a hung GPU driver ends only with a reboot of the host."
                )
            if waiting:
                time.sleep(POLL_SECONDS)

    def start_down(self, names: Iterable[str], patience: float) -> list[str]:
        """Start those programs that supervisord knows but has not running; return their names."""
        processes = self.supervisor.processes()
        down = [name for name in names if name in processes and is_down(processes[name])]
        self._stop(down, patience)  # out of BACKOFF, and to the end of a stop that somebody else began
        for name in down:
            reason = self.supervisor.start(name)
            if reason:
                self.warn(f"{name} cannot be started: {reason}")
        return down

    def await_up(self, programs: Mapping[str, Program], readiness: Readiness, fresh: Collection[str]) -> dict[str, str]:
        """Wait until all programs run and are ready, and those in ``fresh`` have answered their smoke requests.

        :param fresh: those that this run took up.
        :returns: by program that did not get there, why, with the tail of its log.
        """
        begun = time.monotonic()
        start_seconds = START_MARGIN_SECONDS + max((startsecs(program) for program in programs.values()), default=0)
        faults: dict[str, str] = {}
        waiting = set(programs)
        pids: dict[str, list[int]] = {name: [] for name in programs}
        while waiting:
            elapsed = time.monotonic() - begun
            processes = self.supervisor.processes()
            running = set()
            for name in sorted(waiting):
                process, is_fresh = processes.get(name), name in fresh
                if process and process.pid and process.pid not in pids[name][-1:]:
                    pids[name].append(process.pid)
                is_late = elapsed > (start_seconds if is_fresh else readiness.timeout)
                fault = trouble(process, pids[name], is_fresh, is_late)
                if fault:
                    faults[name] = fault
                # An answer proves more than the startsecs do that Supervisor lets pass before it says RUNNING.
                if not fault and processes[name].state in (
                    {"RUNNING"} if name not in readiness.ports else STARTED_STATES
                ):
                    running.add(name)
            answers = readiness.ask(sorted(running & set(readiness.ports)))
            for name, (verdict, answer) in answers.items():
                if verdict == "failed" or (verdict == "waiting" and elapsed > readiness.timeout):
                    faults[name] = f"not ready after {elapsed:.0f} s: {answer}"
            waiting -= set(faults) | {name for name in running if answers.get(name, ("ready", ""))[0] == "ready"}
            if waiting:
                time.sleep(POLL_SECONDS)
        faults |= readiness.try_out(name for name in fresh if name in readiness.smoke and name not in faults)
        return {name: f"{fault}\n{log_tail(programs[name])}" for name, fault in faults.items()}


def side_by_side(ask: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the answers of ``ask`` by name; all names are asked at a time."""
    asked = list(names)
    if not asked:
        return {}
    with ThreadPoolExecutor(len(asked)) as pool:
        return dict(zip(asked, pool.map(ask, asked)))


def trouble(process: Process | None, pids: Sequence[int], is_fresh: bool, is_late: bool) -> str | None:
    """Tell why a program will not get up, or None while it may.

    :param pids: those that it has had meanwhile. Supervisor starts a program that dies after its startsecs anew at
        once, for ever, and calls it RUNNING again.
    :param is_fresh: whether this run took it up. Any other may be on its way out by itself, worn out or after failed
        requests: it may start anew, once.
    :param is_late: whether it should be RUNNING by now.
    """
    if process is None:
        return "Supervisor does not know it. Does its configuration include this file?"
    if not process.was_started and not is_late:
        return None  # added; supervisord starts it in its next turn
    if process.state == "EXITED" and not is_fresh and not is_late:
        return None  # supervisord starts it anew in its next turn
    if process.state not in STARTED_STATES:
        return f"{process.state}: {process.description}"
    if process.state == "STARTING" and is_late:
        return "still STARTING"
    if len(pids) > (1 if is_fresh else 2):
        return f"died as pid {pids[-2]} and was started again as pid {pids[-1]}"
    return None


def startsecs(program: Program) -> int:
    """Return the seconds after which Supervisor calls a program RUNNING."""
    return program.seconds("startsecs", DEFAULT_STARTSECS)


def is_down(process: Process) -> bool:
    """Tell whether a program is neither up nor on its way, and so has to be started."""
    return process.was_started and process.state not in STARTED_STATES


def is_private(path: Path, text: str) -> bool:
    """Tell whether a file has this text and is readable by its owner only: environments hold passwords."""
    return read(path) == text and stat.S_IMODE(path.stat().st_mode) == SECRET_MODE


def refuse_unknown(plan: Plan) -> None:
    """Raise ProgramsError where a program that is to be restarted is not there."""
    unknown = sorted(set(plan.restart) - set(plan.wanted.programs))
    if unknown:
        raise ProgramsError(
            f"{', '.join(unknown)}: not among the programs of this host, so there is nothing to restart. "
            "Run site.yml, which brings what is missing."
        )


def refuse_missing(plan: Plan) -> None:
    """Raise ProgramsError, before anything is stopped, where a new section names a release that is not on the host."""
    missing = []
    for name in [*plan.changes.added, *plan.changes.changed]:
        options = plan.target.programs[name].options
        needed = [options.get("directory", "/"), options.get("command", "/").split()[0]]
        missing += [f"{name}: {path}" for path in needed if path.startswith("/") and not Path(path).exists()]
    if missing:
        raise ProgramsError(
            f"missing on this host: {', '.join(missing)}. Nothing was stopped. "
            "Run site.yml without --tags, which brings the releases first."
        )


def make_log_directories(wanted: ProgramFile) -> None:
    """Create the directories of the logs, without which supervisord refuses the whole file.

    They belong to root, who writes the logs: in a directory of the programs' user, a link there would let that user
    write any file of the host.
    """
    for program in wanted.programs.values():
        log = program.options.get("stdout_logfile", "")
        if log.startswith("/"):
            Path(log).parent.mkdir(mode=0o750, parents=True, exist_ok=True)


def log_tail(program: Program) -> str:
    """Return the last lines of a program's log, with a heading and indented."""
    log = Path(program.options.get("stdout_logfile", ""))
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join([f"Last lines of {log}:", *(f"  {line}" for line in lines)])


def group_members(group: int) -> list[int]:
    """Return the pids of a process group's living members, from proc(5)."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, member_of = entry.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(member_of) == group and state != "Z":
                members.append(int(entry.parent.name))
    return sorted(members)


def kill_group(group: int) -> list[int]:
    """Kill what is left of a stopped program's process group, which bears the pid of its first process.

    A worker that outlives its killed Gunicorn master would keep its port and the memory of its card.

    :returns: the pids that were killed.
    :raises ProgramsError: they do not end.
    """
    killed = group_members(group) if group else []
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_SECONDS
    while killed and group_members(group):
        if time.monotonic() > deadline:
            raise ProgramsError(f"pids {group_members(group)} survive SIGKILL. Reboot the host.")
        time.sleep(POLL_SECONDS)
    return killed


def override_path(module: AnsibleModule) -> Path:
    """Return the systemd drop-in of the service. It is named like the programs' file: each of these may have one."""
    return Path(f"/etc/systemd/system/{module.params['service']}.service.d", Path(module.params["path"]).name)


def files_wanted(module: AnsibleModule) -> Texts:
    """Return the files besides that of the programs; a drop-in that is left out is not looked at."""
    files = {Path(path): text for path, text in module.params["files"].items()}
    override = module.params["service_override"]
    return files if override is None else {**files, override_path(module): override}


def ensure_files(module: AnsibleModule, differing: Texts) -> None:
    """Write these files; the drop-in holds from the next stop of the service on."""
    for path, text in differing.items():
        write(path, text)
    if override_path(module) in differing:
        code, _, error = module.run_command(["systemctl", "daemon-reload"])
        if code:
            raise ProgramsError(f"systemctl daemon-reload failed with {code}: {error}")


def ensure_supervisord(module: AnsibleModule, supervisor: Supervisor) -> bool:
    """Start supervisord where it does not answer. Return whether it had to be started."""
    if supervisor.answers():
        return False
    command = ["systemctl", "enable", "--now", module.params["service"]]
    code, _, error = module.run_command(command)
    deadline = time.monotonic() + SERVICE_START_SECONDS
    while code == 0 and not supervisor.answers() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if not supervisor.answers():
        raise ProgramsError(
            f"nothing answers at {supervisor.path}, and `{' '.join(command)}` did not help (exit code {code}): {error}"
        )
    return True


def predict(plan: Plan, supervisor: Supervisor) -> dict[str, list[Any]]:
    """Tell what a run would do, from the files and, where it answers, from supervisord; touch nothing."""
    processes = supervisor.processes() if supervisor.answers() else {}
    untouched = [name for name in plan.concerned if name not in plan.changes.names]
    return {
        "added": plan.changes.added,
        "restarted": plan.changes.changed,
        "removed": plan.changes.removed,
        "started": [name for name in untouched if name not in processes or is_down(processes[name])],
        "pending": plan.pending(plan.held),
    }


def converge(host: Host, plan: Plan) -> dict[str, Any]:
    """Bring the host to the wanted programs, as far as the plan permits, and return what was done.

    :raises ProgramsError: some program did not get up; those that had changed are put back.
    """
    refuse_missing(plan)
    begun = time.monotonic()
    changes, found = host.apply(plan)
    stopped = time.monotonic()
    # A run that was cut off may have left a file that supervisord has read and not acted on.
    held = plan.held | ({*found.changed, *found.removed} - changes.names)
    concerned = [name for name in plan.concerned if name not in held]
    touched = {*changes.added, *changes.changed}
    started = host.start_down((name for name in concerned if name not in touched), plan.patience)
    programs = {name: plan.target.programs[name] for name in concerned}
    faults = host.await_up(programs, host.readiness, sorted({*touched, *started}))
    if faults:
        raise ProgramsError(put_back(host, plan, faults))
    result: dict[str, Any] = {
        "added": changes.added,
        "restarted": changes.changed,
        "removed": changes.removed,
        "started": started,
        "pending": plan.pending(held),
    }
    if touched or changes.removed:
        result["seconds"] = {"stop": round(stopped - begun, 1), "ready": round(time.monotonic() - stopped, 1)}
    return result


def put_back(host: Host, plan: Plan, faults: Mapping[str, str]) -> str:
    """Put the failed programs back on their previous sections and return the report for the operator."""
    present, reached = plan.present, plan.target
    undone = [name for name in faults if present.programs.get(name) != reached.programs[name]]
    restored = {name: present.programs[name] for name in undone if name in present.programs}
    still_broken: dict[str, str] = {}
    if undone:
        host.apply(Plan(reached.put_back(undone, present), reached, undone))
        ports = {name: program.port for name, program in restored.items() if program.port}
        still_broken = host.await_up(restored, replace(host.readiness, ports=ports, smoke={}), restored)
    lines = []
    for name, fault in sorted(faults.items()):
        if name in still_broken:
            first_line = still_broken[name].splitlines()[0]
            outcome = f"Put back on its previous settings, which do not run either: {first_line}"
        elif name in restored:
            outcome = "Put back on its previous settings, it runs."
        elif name in undone:
            outcome = "New, so taken out again."
        else:
            outcome = "Its settings had not changed; it is left as it is."
        lines.append(f"{name}: {outcome} It failed: {fault}")
    return "\n".join(lines)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "content": {"type": "str", "required": True, "no_log": True},
            "prefix": {"type": "str", "default": "gpufleet-"},
            "ready_ports": {"type": "dict", "default": {}},
            "ready_address": {"type": "str", "default": "127.0.0.1"},
            "ready_path": {"type": "str", "default": "/_slot_guard/ready"},
            "ready_timeout": {"type": "int", "default": 900},
            "smoke": {"type": "dict", "default": {}},
            "replace": {"type": "list", "elements": "str"},
            "restart": {"type": "list", "elements": "str", "default": []},
            "socket": {"type": "path", "default": "/run/supervisor.sock"},
            "service": {"type": "str", "default": "supervisor"},
            "files": {"type": "dict", "default": {}},
            "service_override": {"type": "str"},
        },
        supports_check_mode=True,
    )
    path = Path(module.params["path"])
    prefix = module.params["prefix"]
    supervisor = Supervisor(module.params["socket"], prefix)
    readiness = Readiness(
        {name: int(port) for name, port in module.params["ready_ports"].items()},
        module.params["ready_address"],
        module.params["ready_path"],
        module.params["ready_timeout"],
        module.params["smoke"],
    )
    try:
        wanted = parse_programs(module.params["content"], prefix)
    except ValueError as error:
        module.fail_json(msg=f"content: {error}")
    try:
        present = parse_programs(read(path) or "", prefix)
    except ValueError as error:
        module.warn(f"{path} was not readable as programs and is replaced: {error}")
        present = ProgramFile("", {})

    plan = Plan(wanted, present, module.params["replace"], module.params["restart"])
    files = files_wanted(module)
    found = {file: read(file) for file in files}
    differing = {file: text for file, text in files.items() if found[file] != text}
    changed = bool(differing) or not is_private(path, plan.target.text)
    result: dict[str, Any] = {"programs": {}, "changed": changed}
    if module._diff:
        salt = os.urandom(16)
        programs = {
            "before_header": str(path),
            "after_header": str(path),
            "before": describe(present.programs, salt),
            "after": describe(plan.target.programs, salt),
        }
        result["diff"] = [programs, *differences(found, files)]
    try:
        refuse_unknown(plan)
        if module.check_mode:
            done = predict(plan, supervisor)
        else:
            ensure_files(module, differing)
            result["changed"] |= ensure_supervisord(module, supervisor)
            done = converge(Host(path, supervisor, readiness, module.warn), plan)
            result["programs"] = {
                name: {"state": process.state, "pid": process.pid} for name, process in supervisor.processes().items()
            }
    except (ProgramsError, OSError, xmlrpc.client.Error) as error:
        module.fail_json(msg=str(error), **result)
    touched = any(done[key] for key in ("added", "restarted", "removed", "started"))
    module.exit_json(**{**result, **done, "changed": result["changed"] or touched})


if __name__ == "__main__":
    main()

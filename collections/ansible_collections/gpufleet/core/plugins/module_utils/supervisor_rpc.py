# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""What a running supervisord says and does, over its own XML-RPC interface.

Standard library only, Python 3.9 or newer.
"""

from __future__ import annotations

import contextlib
import http.client
import xmlrpc.client
from dataclasses import dataclass
from typing import Any

from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import Changes
from ansible_collections.gpufleet.core.plugins.module_utils.unix_http import UnixConnection

#: A local call is answered by supervisord's one loop; it never waits for a program here.
TIMEOUT_SECONDS = 30.0

# supervisor.xmlrpc.Faults
FAULT_ALREADY_STARTED = 60
FAULT_NOT_RUNNING = 70
FAULT_CANT_REREAD = 92


class ProgramsError(Exception):
    """The host cannot be brought to the wanted programs; the message is for the operator."""


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = UnixConnection(self._path, TIMEOUT_SECONDS)
        self._connection = host, connection  # what the base class closes
        return connection


@dataclass(frozen=True)
class Process:
    """What supervisord says of one program; ``pid`` is 0 where it has no process."""

    state: str
    pid: int
    was_started: bool
    description: str


class Supervisor:
    """The programs of one prefix, as a running supervisord knows them.

    Speaks the XML-RPC interface that supervisorctl speaks: states and pids come typed, faults with codes, and several
    programs can stop at a time, while each supervisorctl call costs a Python start and a text to parse.
    """

    def __init__(self, path: str, prefix: str) -> None:
        """Talk to the Unix socket ``path`` about the programs whose names begin with ``prefix``."""
        self.path = path
        self.prefix = prefix

    def answers(self) -> bool:
        """Tell whether supervisord is there."""
        with contextlib.suppress(OSError):
            self._call("getState")
            return True
        return False

    def reread(self) -> Changes:
        """Let supervisord read its files again and tell what they would change; nothing is started or stopped.

        :raises ProgramsError: it refuses the files.
        """
        try:
            added, changed, removed = self._call("reloadConfig")[0]
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != FAULT_CANT_REREAD:
                raise
            raise ProgramsError(f"Supervisor refuses its configuration: {fault.faultString}") from fault
        return Changes(*(sorted(name for name in names if self._ours(name)) for names in (added, changed, removed)))

    def processes(self) -> dict[str, Process]:
        """Return what runs, by program."""
        return {
            info["name"]: Process(info["statename"], info["pid"], info["start"] > 0, info["description"])
            for info in self._call("getAllProcessInfo")
            if self._ours(info["group"])
        }

    def start(self, name: str) -> str | None:
        """Start a program, without waiting. Return why it cannot be started, or None."""
        try:
            self._call("startProcess", name, False)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != FAULT_ALREADY_STARTED:
                return fault.faultString
        return None

    def stop(self, name: str) -> None:
        """Send a program its stop signal, without waiting. SIGKILL follows after its stopwaitsecs."""
        try:
            self._call("stopProcess", name, False)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != FAULT_NOT_RUNNING:
                raise

    def add(self, name: str) -> None:
        """Take a program up as the files have it; supervisord starts it by itself."""
        self._call("addProcessGroup", name)

    def remove(self, name: str) -> None:
        """Forget a stopped program."""
        self._call("removeProcessGroup", name)

    def _ours(self, name: str) -> bool:
        return name.startswith(self.prefix)

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            with xmlrpc.client.ServerProxy("http://localhost", transport=_UnixTransport(self.path)) as proxy:
                return getattr(proxy.supervisor, method)(*arguments)
        except xmlrpc.client.ProtocolError as error:
            raise ProgramsError(
                f"supervisord at {self.path} answers HTTP {error.errcode} {error.errmsg}. "
                "Its [unix_http_server] must not ask for a password: mode 0700 keeps others out."
            ) from error

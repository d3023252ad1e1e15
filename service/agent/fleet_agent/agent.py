"""The agent: a pass about once a second, from the answers of all guards to the flags of the gateway."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial

from fleet_agent import drains, status
from fleet_agent.asking import LAG_LIMIT, ask_all
from fleet_agent.audit import AuditLog, Change
from fleet_agent.config import Config, ConfigError, ConfigFile
from fleet_agent.decision import READY, SILENT, Standing, decide
from fleet_agent.edition import Edition, Reply
from fleet_agent.flags import Flags
from fleet_agent.server import StatusServer
from fleet_agent.viewers import Viewers

INTERVAL_SECONDS = 1.0
"""From the beginning of a pass to that of the next."""

DEADLINE_SECONDS = 0.8
"""Within which all guards must have answered. The rest of the interval is for the flags."""

GLANCE_SECONDS = 0.2
"""Between two looks, in the rest of an interval, at what may soon be ready; also how long an answer to one may take."""

GLANCES = 50
"""So many instances are looked at then at most: a whole fleet that starts can wait for the next pass."""

NEVER_ASKED = Standing()

logger = logging.getLogger("fleet_agent")


class Complaints:
    """Says what is wrong once, and when it is over, however often it is found."""

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self._known: dict[str, str] = {}

    def report(self, subject: str, fault: str = "") -> None:
        """Tell the log that a subject has another fault than it had, or none any more."""
        known = self._known.get(subject, "")
        if fault and fault != known:
            logger.warning("%s: %s", subject, fault)
        elif known and not fault:
            logger.info("%s: all right again", subject)
        self._known[subject] = fault


class Agent:
    """Keeps the flags of one gateway.

    It decides on answers and on the number of passes, never on the time of day. What it cannot do (read a directory,
    write a flag, be heard) it says once, and goes on with the rest.
    """

    def __init__(self, file: ConfigFile) -> None:
        """Take the instances from `file`; ConfigError where it cannot be used."""
        config = file.read_if_changed()
        assert config is not None, "a file that was never read has changed"
        self._file = file
        self._complaints = Complaints()
        self._flags: Flags | None = None
        self._server: StatusServer | None = None
        self._drained: Mapping[str, drains.Drain] = {}
        self._audit_log = AuditLog()
        self._changes: tuple[Change, ...] = ()
        self._config = config
        self._view = status.View(config, {}, {}, "", now(), 0.0)
        self._edition = Edition(self._view)
        self._viewers = Viewers(self._edition)

    async def run(self) -> None:
        """Make passes until cancelled."""
        loop = asyncio.get_running_loop()
        logger.info("%d instances, a pass every %g s", len(self._config.instances), INTERVAL_SECONDS)
        try:
            while True:
                began = loop.time()
                await self.make_pass()
                await self._rest(began + INTERVAL_SECONDS)
        finally:
            self.close()

    async def _rest(self, until: float) -> None:
        """Return at `until`, a time of the loop, or once an instance that is kept out answers ready.

        Silent ones are not asked: each would cost its whole time.
        """
        loop = asyncio.get_running_loop()
        standings = self._view.standings
        returning = [i for i in self._config.instances if standings[i.id].flagged and not standings[i.id].misses]
        while (left := until - loop.time()) > GLANCE_SECONDS and returning:
            await asyncio.sleep(GLANCE_SECONDS)
            answers, _ = await ask_all(returning[:GLANCES], GLANCE_SECONDS)
            if any(answer.state == READY for answer in answers.values()):
                return
        await asyncio.sleep(max(0.0, left))

    def close(self) -> None:
        """Stop answering; the flags stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def make_pass(self) -> status.View:
        """Ask every instance, bring the flags to what follows, and return it."""
        began = asyncio.get_running_loop().time()
        self._reread()
        standings = self._take_over_flags()
        config = self._config
        answers, lag = await ask_all(config.instances, DEADLINE_SECONDS)
        starved = lag > LAG_LIMIT and any(answer.state == SILENT for answer in answers.values())
        if starved:
            answers = {name: answer for name, answer in answers.items() if answer.state != SILENT}
        decision = decide(standings, answers, config.silence_share, now())
        self._write_flags(decision.standings)
        warning = ""
        if starved:
            warning = "this machine is so busy that answers may have been missed: silence is not counted"
        elif decision.held:
            warning = (
                f"more than {config.silence_share:g} of all instances are silent, as if this machine were cut off: "
                "silence raises no flag"
            )
        self._complaints.report("silence", warning)
        seconds = asyncio.get_running_loop().time() - began
        drained, changes = self._read_drained(config), self._read_changes(config)
        view = status.View(config, decision.standings, drained, warning, now(), seconds, changes)
        self._log_changes(view)
        self._view = view
        self._edition = Edition(view, before=self._edition.document if self._viewers else None)
        self._viewers.tell(self._edition)
        await self._serve(config)
        return view

    def _reread(self) -> None:
        """Take a changed configuration over; one that cannot be used leaves the old one in force."""
        try:
            config = self._file.read_if_changed()
        except ConfigError as error:
            self._complaints.report("configuration", f"{error}; the one before stays in force")
            return
        if config is None:
            return
        self._complaints.report("configuration")
        logger.info("configuration read again: %d instances", len(config.instances))
        if config.down_directory != self._config.down_directory:
            self._flags = None
        if config.socket != self._config.socket:
            self.close()
        self._config = config

    def _take_over_flags(self) -> dict[str, Standing]:
        """The standings of the instances there are now; of one never asked, what an agent before this one decided."""
        standings = {i.id: self._view.standings.get(i.id, NEVER_ASKED) for i in self._config.instances}
        if self._flags is None:
            try:
                self._flags = Flags(self._config.down_directory)
            except OSError as error:
                self._complaints.report("flags", str(error.strerror))
            else:
                for name, text in self._flags.texts.items():
                    if standings.get(name) == NEVER_ASKED:
                        standings[name] = Standing.from_flag(text, now())
        return standings

    def _write_flags(self, standings: Mapping[str, Standing]) -> None:
        if self._flags is not None:
            wanted = {name: f"{standing.flag}\n" for name, standing in standings.items() if standing.flagged}
            self._complaints.report("flags", ", ".join(sorted(self._flags.apply(wanted))))

    def _read_drained(self, config: Config) -> Mapping[str, drains.Drain]:
        """What the raised drain flags tell, by name; those last seen where the directory cannot be read."""
        try:
            self._drained = drains.read(config.drain_directory)
        except OSError as error:
            self._complaints.report("drain flags", str(error.strerror))
        else:
            self._complaints.report("drain flags")
        return self._drained

    def _read_changes(self, config: Config) -> tuple[Change, ...]:
        """What operators and roll-outs did last; what was known of it where the log cannot be read."""
        try:
            self._changes = self._audit_log.read(config.audit_log)
        except OSError as error:
            self._complaints.report("audit log", str(error.strerror))
        else:
            self._complaints.report("audit log")
        return self._changes

    def _log_changes(self, view: status.View) -> None:
        for name, standing in view.standings.items():
            before = self._view.state(name) if name in self._view.standings else READY
            after = view.state(name)
            if before != after:
                logger.info("%s: %s, was %s%s", name, after, before, f": {standing.reason}" if standing.reason else "")

    async def _serve(self, config: Config) -> None:
        if self._server is None:
            kinds = ("/cluster/status", "/health", "/metrics")
            replies = {path: partial(self._reply, path) for path in kinds}
            self._server = StatusServer(config.socket, replies, {"/cluster/events": self._viewers})
        try:
            await self._server.ensure()
        except OSError as error:
            self._complaints.report("socket", str(error.strerror))
        else:
            self._complaints.report("socket")

    def _reply(self, path: str) -> Reply:
        return self._edition.replies[path]


def now() -> str:
    """The time as ISO 8601 in UTC, to the second: for people to read, never to decide on."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

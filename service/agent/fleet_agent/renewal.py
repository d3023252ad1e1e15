"""Fresh counts for the gateway once an nginx worker has died: `python3 -m fleet_agent.renewal`. Runs as root.

nginx counts connections in shared memory. What a killed or crashed worker held stays counted there, over reloads too:
slots that no request would ever get again. To nginx a zone of another size is a new one. So the zones are in files of
their own, and a reload with other sizes in them begins to count anew. Requests that run then are not in the new counts:
until they end, the slot guards alone keep the cap of each GPU, as they always can.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO

INTERVAL_SECONDS = 0.5
"""Between two looks at the log: deaths within it are one renewal."""

DEATH = re.compile(
    rb"^[\d/]+ [\d:]+ \[alert\] \d+#\d+: (worker process \d+ exited (?:on signal|with fatal code) \d+)", re.MULTILINE
)
"""What nginx's master writes of a worker that did not end by itself; a reload's old workers exit with code 0.

From its beginning: clients can have their words in the middle of a line.
"""

AT_A_TIME = 1 << 20
"""Bytes of the log; nginx's lines have 2,048 at most."""

SIZE = re.compile(r"(?<=:)\d+(?=m;)")
LEAST_MEGABYTES = 10
SIZES = 10
"""So many sizes in turn: each reload finds another one than any that may still be in use."""

logger = logging.getLogger("fleet_agent")


class Log:
    """A log that is read as it grows, also when another file takes its place."""

    def __init__(self, path: Path, position: tuple[int, int] = (0, 0)) -> None:
        """Read `path` on from a position that was given by an earlier `position`, else from the beginning."""
        self._path = path
        self._file: BinaryIO | None = None
        self._known = position

    @property
    def position(self) -> tuple[int, int]:
        """Which file is read (its inode), and how far it was."""
        return self._known

    def read(self) -> bytes:
        """What was written since; of a file that was replaced its rest too, OSError where it cannot be read."""
        rest = self._read_on() if self._file else b""
        try:
            inode = self._path.stat().st_ino
        except FileNotFoundError:  # between two files
            return rest
        if self._file and inode == self._known[0]:
            return rest
        self._open()
        return rest + self._read_on()

    def close(self) -> None:
        """Read no more."""
        if self._file:
            self._file.close()

    def _open(self) -> None:
        self.close()
        self._file = self._path.open("rb")
        status = os.fstat(self._file.fileno())
        inode, offset = self._known
        if inode == status.st_ino and offset <= status.st_size:
            self._file.seek(offset)
        self._known = status.st_ino, self._file.tell()

    def _read_on(self) -> bytes:
        """Whole lines only: the rest of one is read once it is there. An emptied log is read from its beginning."""
        assert self._file is not None
        if self._file.tell() > os.fstat(self._file.fileno()).st_size:
            self._file.seek(0)
        text = self._file.read(AT_A_TIME)
        whole = text[: text.rfind(b"\n") + 1]
        self._file.seek(len(whole) - len(text), os.SEEK_CUR)
        self._known = self._known[0], self._file.tell()
        return whole


class Renewal:
    """Watches one nginx, and renews its zones when a worker has died."""

    def __init__(self, log: Path, zones: Path, pid_file: Path) -> None:
        """Go on where an earlier process left off: a file in the folder `zones` says what of the log was heeded."""
        self._zones, self._pid_file = zones, pid_file
        self._heeded = zones / "heeded"
        self._log = Log(log, _position(_read(self._heeded)))

    def look(self) -> bool:
        """Renew the zones if the log tells of a death; return whether it did."""
        deaths = DEATH.findall(self._log.read())
        if not deaths:
            return False
        logger.warning("%s: the gateway begins to count anew", ", ".join(death.decode() for death in deaths))
        self._renew()
        return True

    def close(self) -> None:
        """Watch no more."""
        self._log.close()

    def _renew(self) -> None:
        for zone in self._zones.glob("[!.]*.conf"):
            _replace(zone, with_other_size(_read(zone)))
        # Last: who is killed before this heeds the same death again.
        _replace(self._heeded, "{} {}\n".format(*self._log.position))
        try:
            os.kill(int(self._pid_file.read_text()), signal.SIGHUP)
        except (FileNotFoundError, ProcessLookupError):
            logger.info("nginx does not run: it will begin with the new counts")


def with_other_size(zone: str) -> str:
    """The text of a zone with the size that comes next."""
    return SIZE.sub(lambda size: str(LEAST_MEGABYTES + (int(size[0]) + 1 - LEAST_MEGABYTES) % SIZES), zone)


def _position(heeded: str) -> tuple[int, int]:
    found = re.match(r"(\d+) (\d+)\n", heeded)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.chmod(0o644)
    unfinished.replace(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:  # nothing was heeded yet
        return ""


def main() -> int:
    """Watch until killed."""
    parser = argparse.ArgumentParser(prog="fleet_agent.renewal", description=__doc__)
    parser.add_argument("--log", type=Path, required=True, help="nginx's error log")
    parser.add_argument("--zones", type=Path, required=True, help="folder of nginx's limit_conn_zone directives")
    parser.add_argument("--pid-file", type=Path, required=True, help="where nginx's master writes its process id")
    options = parser.parse_args()
    logging.basicConfig(format="[%(asctime)s] [%(levelname)s] %(message)s", level=logging.INFO, stream=sys.stderr)
    renewal = Renewal(options.log, options.zones, options.pid_file)
    while True:
        try:
            renewal.look()
        except OSError as error:
            logger.error("%s", error)
        time.sleep(INTERVAL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())

"""The programs under test, from the distribution: the installed ones, else unpacked without installing a service."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from bench import PROJECT
from testbed.shell import environment, unpack

PACKAGES = {
    "nginx": ("nginx",),
    "haproxy": ("haproxy", "liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1"),
    "wrk": ("wrk", "libluajit-5.1-2"),
}
"""By program the Debian package that brings it, and the libraries that a plain host lacks."""
SERVED_BY = ("gunicorn", "uvloop")
"""Python packages that the simulated GPUs are served by."""


class Software:
    """Where each program is, and what it needs around it to run."""

    def __init__(self, cache: Path = PROJECT / ".cache") -> None:
        """Unpack what is asked for and not installed below `cache`."""
        self._cache = cache
        self._paths: dict[str, str] = {}

    def __getitem__(self, program: str) -> str:
        """The path of a program."""
        if program not in self._paths:
            self._paths[program] = self._find(program, self._cache / program)
        return self._paths[program]

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which unpacked programs find their libraries."""
        libraries = (path for program in PACKAGES for path in (self._cache / program / "usr/lib").glob("*-linux-gnu"))
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}

    def versions(self) -> Mapping[str, str]:
        """What each program says of its version, and those of what the simulated GPUs are served by."""
        programs = {program: self._version(program) for program in PACKAGES}
        return programs | {package: metadata.version(package) for package in SERVED_BY}

    def _find(self, program: str, folder: Path) -> str:
        if installed := shutil.which(program, path=environment()["PATH"]):
            return installed
        unpack(folder, *PACKAGES[program])
        places = (folder / place / program for place in ("usr/sbin", "usr/bin"))
        return str(next(place for place in places if place.exists()))

    def _version(self, program: str) -> str:
        said = subprocess.run([self[program], "-v"], capture_output=True, text=True, env=self.environment)
        line = (said.stdout + said.stderr).splitlines()[0]
        return next(word for word in line.replace("/", " ").split() if word[:1].isdigit())

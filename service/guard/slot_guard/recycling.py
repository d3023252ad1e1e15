"""When an instance has worn out: limits to what a leak makes grow, and how much memory there is in use."""

from __future__ import annotations

import resource
import zlib
from dataclasses import dataclass
from pathlib import Path

SPREAD = 0.1
"""Instances that began together do not end together: each has limits of its own in the last tenth."""

CHECK_SECONDS = 5.0
"""How often an instance looks at itself."""

LEAST_SECONDS = 60.0
"""No instance is worn out sooner: one whose limits are too low would never serve, and Supervisor takes ten seconds to
believe in a start."""


@dataclass(frozen=True)
class Wear:
    """How far an instance has come, or may come."""

    megabytes: float | None = None
    """Memory of the process and its children."""
    requests: float | None = None
    """Requests worked on."""
    seconds: float | None = None
    """Time that it serves."""

    def for_instance(self, instance: str) -> Wear:
        """These limits as an instance has them: always the same for it, others for others."""
        share = 1 - SPREAD * zlib.crc32(instance.encode()) / 2**32
        return Wear(*(limit and limit * share for limit in (self.megabytes, self.requests, self.seconds)))

    def reached(self, now: Wear) -> str:
        """Which of these limits is reached `now`, in words; empty for none."""
        if now.megabytes is not None and self.megabytes is not None and now.megabytes >= self.megabytes:
            return f"uses {now.megabytes:.0f} MB of memory, its limit is {self.megabytes:.0f}"
        if now.requests is not None and self.requests is not None and now.requests >= self.requests:
            return f"has worked on {now.requests:.0f} requests, its limit is {self.requests:.0f}"
        if now.seconds is not None and self.seconds is not None and now.seconds >= self.seconds:
            return f"has served for {now.seconds:.0f} s, its limit is {self.seconds:.0f}"
        return ""


UNLIMITED = Wear()


def resident_megabytes(process: Path = Path("/proc/self")) -> float:
    """Resident memory of a process and all its children; what has ended meanwhile counts nothing."""
    try:
        pages = int((process / "statm").read_text().split()[1])
        children = [pid for task in (process / "task").iterdir() for pid in (task / "children").read_text().split()]
    except OSError:
        return 0.0
    own = pages * resource.getpagesize() / 2**20
    return own + sum(resident_megabytes(Path("/proc", pid)) for pid in children)

"""What one guarded instance is told about itself."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from slot_guard.recycling import UNLIMITED, Wear
from slot_guard.smoke import Smoke

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


@dataclass(frozen=True)
class Settings:
    """The settings of one instance; `from_environment` reads them from SLOT_GUARD_*."""

    app: str
    """The guarded app, as module:attribute."""
    slots: int = 2
    """Requests that may be worked on at once."""
    queue: int = 0
    """Requests that may wait for a slot."""
    queue_timeout_seconds: float = 5.0
    """How long one may wait, all GPUs that it waited at taken together."""
    instance: str = ""
    """Id of the instance in the fleet."""
    version: str = ""
    """Release that it runs."""
    admin_from: tuple[Network, ...] = ()
    """Networks whose peers may use the admin endpoints; loopback may always."""
    failure_limit: int = 3
    """Failed requests in a row after which the instance is taken out and restarted."""
    time_limit_seconds: int | None = None
    """How long its last requests may take once it is taken out or recycled; None: as long as they do."""
    limits: Wear = UNLIMITED
    """Where the instance is recycled."""
    smoke: Smoke | None = None
    """Request that the app must answer well before it is ready."""
    state_directory: Path | None = None
    """Where the next process finds that this one was taken out."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read SLOT_GUARD_APP and, for each of the others, SLOT_GUARD_* as below.

        ValueError names the variable at fault. The state directory is HOME where SLOT_GUARD_STATE names no other.
        """
        app = environ.get("SLOT_GUARD_APP", "")
        module, _, attribute = app.partition(":")
        if not module or not attribute:
            raise ValueError(f"SLOT_GUARD_APP is {app!r}; it must be module:attribute")
        try:
            peers = environ.get("SLOT_GUARD_ADMIN_FROM", "").split(",")
            admin_from = tuple(ipaddress.ip_network(peer.strip(), strict=False) for peer in peers if peer.strip())
        except ValueError as error:
            raise ValueError(f"SLOT_GUARD_ADMIN_FROM must list addresses or networks: {error}") from error
        smoke = environ.get("SLOT_GUARD_SMOKE", "")
        try:
            smoke_request = Smoke.from_json(smoke) if smoke else None
        except ValueError as error:
            raise ValueError(f"SLOT_GUARD_SMOKE is {smoke!r}: {error}") from error
        state_directory = environ.get("SLOT_GUARD_STATE") or environ.get("HOME")
        return cls(
            app=app,
            slots=_whole_number(environ, "SLOT_GUARD_SLOTS", 2),
            queue=_whole_number(environ, "SLOT_GUARD_QUEUE", 0, least=0),
            queue_timeout_seconds=_whole_number(environ, "SLOT_GUARD_QUEUE_SECONDS", 5),
            instance=environ.get("SLOT_GUARD_INSTANCE", ""),
            version=environ.get("SLOT_GUARD_VERSION", ""),
            admin_from=admin_from,
            failure_limit=_whole_number(environ, "SLOT_GUARD_FAILURES", 3),
            time_limit_seconds=_limit(environ, "SLOT_GUARD_TIME_LIMIT"),
            limits=Wear(
                _limit(environ, "SLOT_GUARD_MEMORY_MEGABYTES"),
                _limit(environ, "SLOT_GUARD_RECYCLE_REQUESTS"),
                _limit(environ, "SLOT_GUARD_RECYCLE_SECONDS"),
            ),
            smoke=smoke_request,
            state_directory=Path(state_directory) if state_directory else None,
        )


def _limit(environ: Mapping[str, str], variable: str) -> int | None:
    return _whole_number(environ, variable, 1) if variable in environ else None


def _whole_number(environ: Mapping[str, str], variable: str, default: int, least: int = 1) -> int:
    value = environ.get(variable, str(default))
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"{variable} is {value!r}; it must be a whole number from {least}")
    return int(value)

"""What the agent is told: the instances of the fleet and the places of its flags. Read again when the file changes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


class ConfigError(Exception):
    """The file says nothing that can be used; the message tells why."""


@dataclass(frozen=True)
class Instance:
    """One GPU instance, as the inventory derives it; what else the file says of it is for others."""

    id: str
    service: str
    host: str
    gpu: int
    address: str
    """IP address or host name, an IPv6 one with or without brackets."""
    port: int
    slots: int


@dataclass(frozen=True)
class Config:
    """The whole file."""

    cluster: str
    """Name that the status document bears."""
    silence_share: float
    """Share of all instances, 0 to 1, that may be kept out because they are silent."""
    down_directory: Path
    """Where the flags of this agent are."""
    drain_directory: Path
    """Where operators' drain flags are."""
    audit_log: Path
    """Where it is written down who changed what."""
    socket: Path
    """Unix socket at which the agent answers."""
    instances: tuple[Instance, ...]

    @classmethod
    def parse(cls, text: bytes) -> Config:
        """Read the JSON text; ConfigError tells what is wrong with it."""
        try:
            given = json.loads(text)
            instances = tuple(_instance(entry) for entry in given["instances"])
            config = cls(
                cluster=str(given["cluster"]),
                silence_share=float(given["silence_share"]),
                down_directory=Path(given["down_directory"]),
                drain_directory=Path(given["drain_directory"]),
                audit_log=Path(given["audit_log"]),
                socket=Path(given["socket"]),
                instances=instances,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a configuration of the agent: {type(error).__name__}: {error}") from error
        if not 0 <= config.silence_share <= 1:
            raise ConfigError(f"silence_share is {config.silence_share} and must be from 0 to 1")
        if not instances or len({instance.id for instance in instances}) < len(instances):
            raise ConfigError("instances must not be empty, and no id may be there twice")
        return config


def _instance(entry: dict[str, Any]) -> Instance:
    instance = Instance(**{field.name: entry[field.name] for field in fields(Instance)})
    if not isinstance(instance.id, str) or instance.id.startswith(".") or "/" in instance.id or not instance.id:
        raise ValueError(f"{instance.id!r} cannot be the name of a flag")
    for number in (instance.gpu, instance.port, instance.slots):
        if not isinstance(number, int):
            raise TypeError(f"{number!r} in {instance.id} is not a whole number")
    return instance


class ConfigFile:
    """A configuration file that may be replaced at any time."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self._path = path
        self._seen: tuple[int, ...] = ()

    def read_if_changed(self) -> Config | None:
        """The configuration if the file is not the one that was read last, else None.

        ConfigError where there is no file, and once for each one that cannot be used.
        """
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if seen == self._seen:
                return None
            text = self._path.read_bytes()
        except OSError as error:
            self._seen = ()
            raise ConfigError(str(error.strerror)) from error
        self._seen = seen
        return Config.parse(text)

"""What people write: environment.yml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from packaging.requirements import InvalidRequirement, Requirement

from tools.condaenv import CondaError

CHANNEL = "conda-forge"


class Environment(NamedTuple):
    """The packages that an environment.yml asks for."""

    conda: list[str]
    pip: list[str]


def read_environment(path: Path) -> Environment:
    """Read an environment.yml; CondaError for what a lock could not honour."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CondaError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise CondaError(f"{path} is empty or not a mapping")
    if unknown := document.keys() - {"name", "channels", "dependencies"}:
        raise CondaError(f"{path}: {', '.join(sorted(unknown))} is not understood: name, channels, dependencies are")
    _require_conda_forge(path, document.get("channels"))
    dependencies = document.get("dependencies") or []
    conda = [entry for entry in dependencies if isinstance(entry, str)]
    pip = _pip_part(path, [entry for entry in dependencies if not isinstance(entry, str)])
    for spec in conda:
        if "::" in spec or "channel=" in spec:
            raise CondaError(f"{path}: {spec} names a channel: all packages come from {CHANNEL}")
    if not conda:
        raise CondaError(f"{path}: no conda package is asked for: name at least python with its version")
    return Environment(conda, pip)


def _require_conda_forge(path: Path, channels: Any) -> None:
    if channels in ([CHANNEL], [CHANNEL, "nodefaults"]):
        return
    named = ", ".join(map(str, channels or ["none, which means defaults,"]))
    raise CondaError(
        f"{path}: channels must be [{CHANNEL}], and it names {named}: Anaconda's own channels (defaults, main, r, …) "
        "need a licence in companies, and two channels mixed give environments that nobody tested. "
        "For a mirror of conda-forge set conda_env_mirror (--mirror)."
    )


def _pip_part(path: Path, sections: list[Any]) -> list[str]:
    if not sections:
        return []
    if len(sections) > 1 or not isinstance(sections[0], dict) or list(sections[0]) != ["pip"]:
        raise CondaError(f"{path}: besides package names, dependencies hold at most one section, pip:")
    lines: list[str] = sections[0]["pip"] or []
    for line in lines:
        try:
            by_url = Requirement(line).url
        except (InvalidRequirement, TypeError) as error:
            raise CondaError(f"{path}: pip: {line!r} is not a requirement like name>=1.2: {error}") from error
        if by_url:
            raise CondaError(f"{path}: pip: {line!r} is a URL, which no index has a hash for: name a release")
    return lines

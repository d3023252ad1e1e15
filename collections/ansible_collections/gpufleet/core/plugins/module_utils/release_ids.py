"""Ids and places of releases, as pure functions of what lies in the project: the same on every run, without facts.

Used by the filters (templates) and by the tools that build the archives (command line), so that both always agree.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.gpufleet.core.plugins.module_utils.archive import describe, walk

BUILD = 1
"""Raised whenever the builder makes something else of the same lock: a new bit pattern needs a new id."""

IGNORED = frozenset({".git", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"})
"""Names in a code folder that are not part of it."""

_GIT = re.compile(r"[a-z+]+://|[\w.-]+@[\w.-]+:")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class SourceError(Exception):
    """A lock or a source cannot be used; the message names the remedy."""


def conda_release(name: str, lock: str, root: str, project: str, suffix: str = "tar.gz") -> dict[str, str]:
    """Id and places of the release that a lock folder stands for on the hosts, and its archive here."""
    release_id = conda_id(name, Path(project, lock), root)
    store = f"{root}/releases/{name}"
    return {
        "name": name,
        "id": release_id,
        "root": store,
        "path": f"{store}/{release_id}",
        "link": f"{root}/envs/{name}",
        "archive": f"{project}/dist/conda-{name}-{release_id}.{suffix}",
    }


def code_release(name: str, code: Mapping[str, Any], root: str, project: str) -> dict[str, str]:
    """Id and places of the release that a service's code stands for on the hosts, and its archive here."""
    version = code_version(name, code, Path(project))
    store = f"{root}/{name}/releases"
    return {
        "name": name,
        "id": version,
        "root": store,
        "path": f"{store}/{version}",
        "link": f"{root}/{name}/current",
        "archive": f"{project}/dist/code-{name}-{version}.tar.gz",
    }


def conda_id(name: str, lock: Path, root: str) -> str:
    """12 hex digits over what the environment is made of: its place, its packages and wheels by hash.

    Locking again with the same outcome gives the same id, whatever else changed in the files.
    """
    conda, pip = locked_packages(lock)
    recipe = [BUILD, root, name, sorted(conda.values()), sorted(pip)]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def locked_packages(lock: Path) -> tuple[dict[str, str], list[str]]:
    """Conda packages of a lock folder (file name -> sha256) and lines of its pip part (name==version --hash=...)."""
    try:
        # libyaml, where there is one, reads a lock of 200 packages 10 times as fast
        document = yaml.load((lock / "conda.lock").read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        packages = [package for package in document["packages"] if "conda" in package]
        conda = {package["conda"]: package["sha256"] for package in packages}
        lines = (lock / "pip.lock").read_text().splitlines()
    except FileNotFoundError as error:
        raise SourceError(f"{error.filename} does not exist: {_remedy(lock)}") from error
    except (KeyError, TypeError, yaml.YAMLError) as error:
        raise SourceError(f"{lock} holds no lock that can be read ({error!r}): {_remedy(lock)}") from error
    for url in conda:
        if not url.startswith(("https://", "http://")):
            raise SourceError(f"{lock}: {url} would not be checked against its sha256, as http and https packages are")
    by_name = {url.rsplit("/", 1)[1]: digest for url, digest in conda.items()}
    return by_name, [line for line in lines if line and not line.startswith("#")]


def _remedy(lock: Path) -> str:
    return f"make it with python -m tools.condaenv lock {lock}"


def code_version(name: str, code: Mapping[str, Any], project: Path) -> str:
    """Version of a service's code: content of the folder or commit of the repository, and content of the guard."""
    guard = tree_digest(project / "service" / "guard" / "slot_guard")
    source = str(code["source"])
    if is_git(source):
        return f"{resolve(name, code, project)[:12]}-{guard[:8]}"
    folder = project / source
    if not folder.is_dir():
        raise SourceError(f"services.{name}.code.source: {folder} is not a folder, and {source} is not a git URL")
    return hashlib.sha256(f"{tree_digest(folder)} {guard}".encode()).hexdigest()[:12]


def is_git(source: str) -> bool:
    """Whether a source is the URL of a git repository (scheme:// or user@host:path) rather than a folder."""
    return bool(_GIT.match(source))


def mirror(source: str, project: Path) -> Path:
    """Where the controller keeps its copy of a repository."""
    return project / ".cache" / "code" / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.git"


def resolve(name: str, code: Mapping[str, Any], project: Path) -> str:
    """The full commit that a service's revision stands for, as last fetched."""
    revision = str(code.get("version") or "")
    if not revision:
        raise SourceError(f"services.{name}.code.version: a git source needs a revision (tag, branch or commit)")
    if _COMMIT.fullmatch(revision):
        return revision
    copy = mirror(str(code["source"]), project)
    command = ["git", "-C", str(copy), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SourceError(
            f"services.{name}.code.version: {revision} is not in {code['source']} as last fetched; "
            "the role service_code fetches it (tag service_code)"
        )
    return done.stdout.strip()


def tree_digest(folder: Path) -> str:
    """Hash of a folder's files: names, contents, executable bits and links; nothing else counts."""
    entries = {path: describe(source) for path, source in sorted(walk(folder, IGNORED).items())}
    listed = [[path, *entry] for path, entry in entries.items() if entry.kind != "dir"]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

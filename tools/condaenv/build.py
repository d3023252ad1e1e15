"""Lock -> one archive of the finished environment, linked for the place where the hosts will have it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from ansible_collections.gpufleet.core.plugins.module_utils.archive import (
    is_packed,
    pack,
    read_sidecar,
    walk,
    write_sidecar,
)
from ansible_collections.gpufleet.core.plugins.module_utils.release_ids import conda_release, locked_packages
from rattler import LockFile, RepoDataRecord

from tools.condaenv import CondaError, compile_pyc
from tools.condaenv.lock import ENVIRONMENT
from tools.condaenv.packages import link, scratch_folder
from tools.condaenv.wheels import install_wheels, site_packages

FROZEN = (
    "gpufleet deploys this environment as a whole: change environment.yml, lock it and run site.yml. "
    "/ 本环境由 gpufleet 整体部署:请修改 environment.yml,重新锁定并运行 site.yml。"
)
"""What conda and pip say when somebody would change the environment on a host."""


async def build(name: str, folder: Path, root: str, project: Path, suffix: str, mirror: str) -> dict[str, object]:
    """Make the archive of a lock folder, unless it is there; return id, archive, sha256, packages, changed."""
    release = conda_release(name, str(folder), root, str(project), suffix)
    archive = Path(release["archive"])
    contents = package_versions(folder)
    packed = is_packed(archive)
    if not packed:
        cache = project / ".cache" / "condaenv"
        with scratch_folder(cache) as scratch:
            prefix = scratch / "prefix"
            await _make(prefix, Path(release["path"]), folder, mirror, cache)
            pack(archive, name, release["id"], walk(prefix), contents)
    return _answer(release, contents, not packed)


def plan(name: str, folder: Path, root: str, project: Path, suffix: str) -> dict[str, object]:
    """What build would do; only the sidecar is written, so that a check run can tell which packages would change."""
    release = conda_release(name, str(folder), root, str(project), suffix)
    archive = Path(release["archive"])
    contents = package_versions(folder)
    packed = is_packed(archive)
    if not packed:
        write_sidecar(archive, release["id"], contents, None)
    return _answer(release, contents, not packed)


def package_versions(folder: Path) -> dict[str, str]:
    """Packages of a lock folder for people: name -> version (and build), pip's marked as such."""
    conda, wheels = locked_packages(folder)
    versions = {}
    for file_name in conda:
        package, version, build_string = file_name.removesuffix(".conda").removesuffix(".tar.bz2").rsplit("-", 2)
        versions[package] = f"{version} {build_string}"
    for line in wheels:
        package, _, version = line.split()[0].partition("==")
        versions[package] = f"{version} (pip)"
    return versions


def _answer(release: dict[str, str], contents: dict[str, str], changed: bool) -> dict[str, object]:
    sidecar = read_sidecar(Path(release["archive"])) or {}
    return {
        "id": release["id"],
        "archive": release["archive"],
        "sha256": sidecar.get("sha256"),
        "packages": contents,
        "changed": changed,
    }


async def _make(prefix: Path, final: Path, folder: Path, mirror: str, cache: Path) -> None:
    await link(_locked_records(folder / "conda.lock"), prefix, final, mirror, cache)
    if locked_packages(folder)[1]:
        install_wheels(prefix, final, folder / "pip.lock", prefix.with_name("wheels"))
    _seal(prefix)
    _scrub(prefix)
    _compile(prefix, final)


def _locked_records(lock: Path) -> list[RepoDataRecord]:
    environment = LockFile.from_path(lock).environment(ENVIRONMENT)
    if environment is None:
        raise CondaError(f"{lock} has no environment {ENVIRONMENT}")
    (records,) = environment.conda_repodata_records().values()
    return records


def _seal(prefix: Path) -> None:
    """Make conda (CEP 22) and pip (PEP 668) refuse to change the environment."""
    (prefix / "conda-meta" / "frozen").write_text(json.dumps({"message": FROZEN}, ensure_ascii=False) + "\n")
    marker = site_packages(prefix).parent / "EXTERNALLY-MANAGED"
    marker.write_text(f"[externally-managed]\nError={FROZEN}\n")


def _scrub(prefix: Path) -> None:
    """Take out of conda-meta what tells of the build machine: the places of its package cache."""
    for path in (prefix / "conda-meta").glob("*.json"):
        record = json.loads(path.read_text())
        for key in ("extracted_package_dir", "package_tarball_full_path", "link"):
            record.pop(key, None)
        path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _compile(prefix: Path, final: Path) -> None:
    """Compile everything with the environment's own Python: hosts start fast and never write into the release."""
    for stale in prefix.rglob("__pycache__"):
        shutil.rmtree(stale)
    # the hash seed orders frozen sets in the compiled code; -I would ignore it
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("PYTHONPATH", "PYTHONHOME"):
        environment.pop(name, None)
    command = [str(prefix / "bin" / "python"), "-s", "-Wignore", compile_pyc.__file__, str(prefix), str(final)]
    subprocess.run(command, env=environment, check=True)

"""environment.yml -> conda.lock and pip.lock: exact packages with their sha256, solved for the fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rattler import (
    Channel,
    Gateway,
    GenericVirtualPackage,
    LockChannel,
    LockFile,
    LockPlatform,
    PackageName,
    RepoDataRecord,
    SourceConfig,
    Subdir,
    Version,
    solve,
)
from rattler.package import BuildString

from tools.condaenv import CondaError
from tools.condaenv.environment import CHANNEL, read_environment
from tools.condaenv.packages import client, link, scratch_folder
from tools.condaenv.wheels import resolve_wheels

FLEET = {"__unix": "0", "__linux": "5.4", "__glibc": "2.31"}
"""What every host is taken to have, whatever the controller has: Ubuntu 20.04 and everything later do."""

ENVIRONMENT = "default"
"""Name of the only environment in a lock file, as pixi calls it."""


async def lock(folder: Path, mirror: str, virtual: Mapping[str, str], cache: Path) -> dict[str, object]:
    """Write conda.lock and pip.lock beside environment.yml; return what was locked."""
    wanted = read_environment(folder / "environment.yml")
    virtual = {**FLEET, **virtual}
    # repodata is fetched anew: a lock made of yesterday's index is a surprise, and locking is rare
    with scratch_folder(cache) as scratch:
        records = await _solve(wanted.conda, mirror, virtual, scratch / "repodata")
        if unknown := [record.file_name for record in records if record.sha256 is None]:
            raise CondaError(f"the channel gives no sha256 for {unknown[0]}: use another mirror")
        prefix = scratch / "prefix"
        await link(records, prefix, prefix, mirror, cache)
        wheels = resolve_wheels(prefix, wanted.pip, virtual["__glibc"])
    _write_conda_lock(folder / "conda.lock", records, virtual)
    (folder / "pip.lock").write_text("".join(f"{line}\n" for line in wheels))
    return {"folder": str(folder), "conda": len(records), "pip": len(wheels)}


async def _solve(specs: Sequence[str], mirror: str, virtual: Mapping[str, str], repodata: Path) -> list[RepoDataRecord]:
    return await solve(
        sources=[Channel(CHANNEL)],
        specs=specs,
        # a plain file server, as many mirrors are, does not answer for shards as rattler expects (conda/rattler#2719)
        gateway=Gateway(repodata, SourceConfig(sharded_enabled=not mirror), client=client(mirror)),
        platforms=[Subdir.current(), Subdir("noarch")],
        virtual_packages=[
            GenericVirtualPackage(PackageName(name), Version(version), BuildString("0"))
            for name, version in virtual.items()
        ],
    )


def _write_conda_lock(path: Path, records: Sequence[RepoDataRecord], virtual: Mapping[str, str]) -> None:
    asked = [f"{name}={version}" for name, version in sorted(virtual.items())]
    lock_file = LockFile([LockPlatform(str(Subdir.current()), virtual_packages=asked)])
    lock_file.set_channels(ENVIRONMENT, [LockChannel(Channel(CHANNEL).base_url)])
    platform = lock_file.platforms()[0]  # rattler wants its own object back
    for record in sorted(records, key=lambda record: record.file_name):
        lock_file.add_conda_package(ENVIRONMENT, platform, record)
    lock_file.to_path(path)

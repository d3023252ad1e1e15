"""The conda packages of an environment: fetched by hash and linked by rattler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rattler import Channel, Client, Config, PackageCache, RepoDataRecord, ValidationMode, install

from tools.condaenv import CondaError
from tools.condaenv.environment import CHANNEL


def client(mirror: str) -> Client:
    """A client that asks the mirror wherever conda-forge is meant; names, locks and hashes stay conda-forge's."""
    config = Config()
    if mirror:
        config.set(f'mirrors."{Channel(CHANNEL).base_url.rstrip("/")}"', json.dumps([mirror.rstrip("/")]))
    return Client.from_config(config)


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A folder for the block, on the file system of the package cache, so that packages are linked and not copied."""
    cache.mkdir(parents=True, exist_ok=True)
    # when one package fails, rattler's threads may still be writing others
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


async def link(records: Sequence[RepoDataRecord], prefix: Path, final: Path, mirror: str, cache: Path) -> None:
    """Link packages into prefix, for use at final. The cache is not trusted: every file in it is hashed again."""
    await install(
        list(records),
        target_prefix=prefix,
        alternative_target_prefix=final,
        client=client(mirror),
        package_cache=PackageCache.new_layered([cache / "packages"], validation_mode=ValidationMode.full()),
        execute_link_scripts=False,
        show_progress=False,
    )
    scripts = sorted(path.name for path in (prefix / "bin").glob(".*-post-link.sh"))
    if scripts:
        raise CondaError(
            f"{', '.join(scripts)}: packages that run a script when linked do so for one machine and place; "
            "such an environment cannot be built here and used there. Choose other packages."
        )

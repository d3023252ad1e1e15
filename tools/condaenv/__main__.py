"""Command line: python -m tools.condaenv lock FOLDER | build NAME FOLDER. Prints one JSON document."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from ansible_collections.gpufleet.core.plugins.module_utils.archive import FORMATS, ArchiveError
from ansible_collections.gpufleet.core.plugins.module_utils.release_ids import SourceError
from rattler.exceptions import GatewayError, InstallerError, InvalidMatchSpecError, ParseCondaLockError, SolverError

from tools import PROJECT
from tools.condaenv import CondaError
from tools.condaenv.build import build, plan
from tools.condaenv.lock import FLEET, lock

RATTLER_ERRORS = (GatewayError, InstallerError, InvalidMatchSpecError, ParseCondaLockError, SolverError)
"""What rattler raises for a channel, package, environment or lock that will not do."""


def main(arguments: list[str]) -> int:
    """Run a command; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        print(json.dumps(options.run(options), ensure_ascii=False))
    except (CondaError, SourceError, ArchiveError, *RATTLER_ERRORS) as error:
        print(f"condaenv: {error}", file=sys.stderr)
        return 1
    return 0


def _lock(options: argparse.Namespace) -> dict[str, object]:
    virtual = dict(entry.split("=", 1) for entry in options.virtual)
    return asyncio.run(lock(options.folder, options.mirror, virtual, options.project / ".cache" / "condaenv"))


def _build(options: argparse.Namespace) -> dict[str, object]:
    where = (options.name, options.folder, options.root, options.project, options.suffix)
    return plan(*where) if options.plan else asyncio.run(build(*where, options.mirror))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.condaenv", description="Lock and build conda environments.")
    commands = parser.add_subparsers(required=True)
    assumed = ", ".join(f"{name}={version}" for name, version in FLEET.items())

    locking = commands.add_parser("lock", help="solve FOLDER/environment.yml into conda.lock and pip.lock")
    locking.add_argument("folder", type=Path)
    locking.add_argument(
        "--virtual",
        action="append",
        default=[],
        metavar="NAME=VERSION",
        help=f"what every host has, e.g. __cuda=12.4; assumed: {assumed}",
    )
    locking.set_defaults(run=_lock)

    building = commands.add_parser("build", help="make the archive of a lock in PROJECT/dist")
    building.add_argument("name", help="name of the environment")
    building.add_argument("folder", type=Path, help="folder of conda.lock and pip.lock")
    building.add_argument("--root", default="/opt/conda", help="folder of all environments on the hosts (%(default)s)")
    building.add_argument("--suffix", choices=FORMATS, default=FORMATS[0], help="kind of archive (%(default)s)")
    building.add_argument("--plan", action="store_true", help="say what would be built; write only the sidecar")
    building.set_defaults(run=_build)

    for command in (locking, building):
        command.add_argument("--mirror", default="", metavar="URL", help="mirror of conda-forge to fetch from")
        command.add_argument("--project", type=Path, default=PROJECT, help="folder of dist and .cache (%(default)s)")
    return parser


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # py-rattler 0.28 crashes now and then while the interpreter ends, long after its work is done
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

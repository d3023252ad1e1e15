"""Pack a service's code for the hosts: python -m tools.pack NAME SOURCE [--version REVISION]. Prints one JSON document.

A release of code is the source's files and the package slot_guard beside them. Git sources are kept in .cache/code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ansible_collections.gpufleet.core.plugins.module_utils.archive import ArchiveError, is_packed, pack, walk
from ansible_collections.gpufleet.core.plugins.module_utils.release_ids import (
    IGNORED,
    SourceError,
    code_release,
    is_git,
    mirror,
    resolve,
)

from tools import PROJECT

GUARD = "slot_guard"


def pack_code(name: str, code: Mapping[str, str], project: Path) -> dict[str, object]:
    """Make the archive of a service's code in project/dist, unless it is there; return id, archive, changed."""
    if is_git(code["source"]):
        fetch(code["source"], code.get("version", ""), project)
    release = code_release(name, code, "", str(project))
    archive = Path(release["archive"])
    packed = is_packed(archive)
    if not packed:
        with checked_out(name, code, project) as source:
            files = walk(source, IGNORED)
            if clash := {GUARD, f"{GUARD}.py"} & files.keys():
                raise SourceError(
                    f"services.{name}.code.source: {code['source']} has its own {clash.pop()}, where the guard goes: "
                    "rename it there"
                )
            guard = project / "service" / "guard" / GUARD
            files |= {GUARD: guard} | {f"{GUARD}/{path}": file for path, file in walk(guard, IGNORED).items()}
            pack(archive, name, release["id"], files)
    return {"id": release["id"], "archive": release["archive"], "changed": not packed}


def fetch(source: str, revision: str, project: Path) -> None:
    """Bring the controller's copy of a repository up to date, unless it has the exact commit already."""
    copy = mirror(source, project)
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:
            unfinished = Path(scratch, "mirror")
            _git("clone", "--quiet", "--mirror", "--", source, str(unfinished))
            unfinished.rename(copy)
        return
    exact = subprocess.run(["git", "-C", copy, "cat-file", "-e", "--end-of-options", revision], capture_output=True)
    if len(revision) != 40 or exact.returncode:
        _git("-C", str(copy), "fetch", "--quiet", "--prune", "origin")


@contextmanager
def checked_out(name: str, code: Mapping[str, str], project: Path) -> Iterator[Path]:
    """A folder with the source's files: the local folder itself, or the revision of the repository for a while."""
    source = code["source"]
    if not is_git(source):
        yield project / source
        return
    with tempfile.TemporaryDirectory(dir=project / ".cache") as scratch:
        where = (f"--git-dir={mirror(source, project)}", f"--work-tree={scratch}")
        _git(*where, "checkout", "--quiet", "--force", resolve(name, code, project), "--", ".")
        yield Path(scratch)


def _git(*arguments: str) -> None:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run(["git", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SourceError(f"git {arguments[-1]}: {done.stderr.strip()}")


def main() -> int:
    """Command line; the exit code is 1 for anything the operator has to mend."""
    parser = argparse.ArgumentParser(prog="python -m tools.pack", description="Pack a service's code with its guard.")
    parser.add_argument("name", help="name of the service")
    parser.add_argument("source", help="folder, relative to the project, or URL of a git repository")
    parser.add_argument("--version", default="", help="tag, branch or commit of a git source")
    parser.add_argument("--project", type=Path, default=PROJECT, help="folder of dist and .cache (%(default)s)")
    options = parser.parse_args()
    try:
        code = {"source": options.source, "version": options.version}
        print(json.dumps(pack_code(options.name, code, options.project)))
    except (SourceError, ArchiveError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

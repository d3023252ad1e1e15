"""Locks for demo and tests: conda-forge where it answers, else a channel made of this machine's CPython.

Both go through the same lock and build; the channel only takes conda-forge's place by rattler's mirror setting.

    python -m testbed.envs     (locks and builds the demo's environment; prints its folder)
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from testbed import PROJECT, conda_channel
from testbed.conda_channel import inspect, serving

DEMO = {"tts": PROJECT / "envs" / "tts" / "environment.yml"}
"""Environments of inventory/demo: name -> what it asks for. Locked into .cache/envs/NAME, where the inventory looks."""


def prepare(name: str, environment: Path, project: Path = PROJECT, root: str = "/opt/conda") -> Path:
    """Lock an environment.yml and build its archive, unless both are there; return the lock folder.

    The lock is made anew when the environment file, this machine's Python or the tools change. The folder is
    PROJECT/.cache/envs/NAME, the archive lies in PROJECT/dist.
    """
    folder = project / ".cache" / "envs" / name
    record = folder / "made.json"
    made_of = _fingerprint(environment, root)
    made = json.loads(record.read_text()) if record.exists() else {}
    locked = made.get("of") == made_of
    if locked and Path(made["archive"]).exists():
        return folder
    with _packages(project) as (python, virtual, mirror):
        if not locked:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "environment.yml").write_text(_with_python(environment.read_text(), python))
            _condaenv(project, "lock", str(folder), *virtual, *mirror)
        built = _condaenv(project, "build", name, str(folder), "--root", root, *mirror)
    record.write_text(json.dumps({"of": made_of, "archive": built["archive"]}))
    return folder


@contextmanager
def _packages(project: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """What can be had here: the only Python (empty: any), options for lock alone, options for lock and build."""
    if _conda_forge_answers():
        yield "", [], []
        return
    channel = project / ".cache" / "conda-channel"
    subprocess.run([sys.executable, "-m", "testbed.conda_channel", channel], cwd=PROJECT, check=True, stdout=sys.stderr)
    with serving(channel) as url:
        yield inspect(Path(sys.executable)).minor, ["--virtual", f"__glibc={platform.libc_ver()[1]}"], ["--mirror", url]


def _with_python(environment: str, minor: str) -> str:
    """The text of an environment.yml that asks for this Python, whichever it named."""
    if not minor:
        return environment
    document = yaml.safe_load(environment)
    document["dependencies"] = [
        f"python={minor}" if isinstance(spec, str) and re.match(r"python(?![\w.-])", spec) else spec
        for spec in document["dependencies"]
    ]
    return yaml.safe_dump(document)


def _conda_forge_answers() -> bool:
    from rattler import Channel, Subdir

    repodata = f"{Channel('conda-forge').base_url}{Subdir.current()}/repodata.json.zst"
    try:
        with urllib.request.urlopen(urllib.request.Request(repodata, method="HEAD"), timeout=3):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _condaenv(project: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.condaenv", *arguments, "--project", str(project)]
    answer: dict[str, Any] = json.loads(subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE).stdout)
    return answer


def _fingerprint(environment: Path, root: str) -> str:
    sources = [*sorted((PROJECT / "tools" / "condaenv").glob("*.py")), Path(__file__), Path(conda_channel.__file__)]
    made_of = [root, *inspect(Path(sys.executable)), *(path.read_text() for path in (environment, *sources))]
    return hashlib.sha256(json.dumps(made_of, default=str).encode()).hexdigest()


def main() -> None:
    """Prepare the demo's environments."""
    for name, environment in DEMO.items():
        print(prepare(name, environment))


if __name__ == "__main__":
    main()

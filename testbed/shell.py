"""Running commands, installing the Debian packages that bring them, and packing files to hand over."""

import fcntl
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class CommandFailed(RuntimeError):
    """A command ended with another status than 0; the message carries what it said."""


def environment() -> dict[str, str]:
    """Return this process's environment with the folders of daemons on the search path: plain `su` leaves them out."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"}


def run(*command: str, send: bytes = b"", seconds: float = 300) -> str:
    """Run `command` with `send` as its standard input and return what it printed; raise CommandFailed on failure."""
    try:
        done = subprocess.run(command, input=send, capture_output=True, env=environment(), timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandFailed(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        said = (done.stderr + done.stdout).decode(errors="replace").strip()
        raise CommandFailed(f"{' '.join(command)} ended with status {done.returncode}:\n{said}")
    return done.stdout.decode(errors="replace")


def provide(packages: Mapping[str, str]) -> None:
    """Install the Debian packages whose commands are missing: `packages` maps a command to the package bringing it."""
    if not _missing(packages):
        return
    with _apt_alone():
        if missing := _missing(packages):
            print(f"installing {', '.join(missing)}", flush=True)
            _apt("update")
            _apt("install", "--yes", "--no-install-recommends", *missing)


def unpack(folder: Path, *packages: str) -> None:
    """Have Debian packages unpacked in `folder`: their programs can be run, but no service is installed or started."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _apt_alone(), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if folder.exists():
            return
        _apt("update")
        _apt("download", *packages, folder=scratch)
        whole = Path(scratch, "whole")
        for archive in Path(scratch).glob("*.deb"):
            run("dpkg-deb", "--extract", str(archive), str(whole))
        whole.rename(folder)


def _missing(packages: Mapping[str, str]) -> list[str]:
    path = environment()["PATH"]
    return sorted({package for command, package in packages.items() if not shutil.which(command, path=path)})


@contextmanager
def _apt_alone() -> Iterator[None]:
    """Keep other test processes from apt meanwhile: one that finds its lists locked gives up at once."""
    with Path(tempfile.gettempdir(), "gpufleet-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _apt(*arguments: str, folder: str = ".") -> None:
    options = ("--quiet=2", "--option=DPkg::Lock::Timeout=120", "--option=Acquire::Retries=3")
    command = ("apt-get", *options, "--option=APT::Sandbox::User=root", *arguments)
    run("env", f"--chdir={folder}", "DEBIAN_FRONTEND=noninteractive", *command, seconds=600)


def tar(files: Mapping[str, bytes], modes: Mapping[str, int] | None = None) -> bytes:
    """Return a tar archive of `files` (path without its first slash: content), owned by root.

    Files have mode 0644 or what `modes` says. No time of day goes in: the same input gives the same bytes.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            member.mode = (modes or {}).get(path, 0o644)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()

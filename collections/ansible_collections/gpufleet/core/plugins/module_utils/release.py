"""Releases of one thing on a host: folders side by side, and a link that says which one serves.

Layout below ``root``: one folder per release, ``.served`` (ids in the order in which they came into service, the newest
first; going back does not change it), ``.tmp`` while something is unpacked or removed. Standard library only,
Python 3.9 or newer.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ansible_collections.gpufleet.core.plugins.module_utils.archive import (
    MANIFEST,
    ArchiveError,
    Manifest,
    compare,
    sha256,
    unpack,
)

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DRIFT_SHOWN = 50


class ReleaseError(Exception):
    """The release cannot be deployed; the message says what to do."""


class Wanted(NamedTuple):
    """What the task asks for."""

    id: str
    archive: Path | None = None
    """archive on the host; None when it was not brought (yet)"""
    sha256: str | None = None
    activate: bool = True
    record: bool = True
    """it comes into service as the newest; False: it is one that is gone back to"""
    keep: int = 3
    full: bool = False
    """hash every file instead of looking at size and time"""
    in_use: tuple[str, ...] = ()
    """globs of files that name releases in use"""


class Plan(NamedTuple):
    """What there is to do on the host, and how it will be afterwards."""

    drift: dict[str, str] | None
    """path -> how it differs; None when the release is not on the host"""
    needs_archive: bool
    switches: bool
    current: str | None
    served: list[str]
    """ids that serve or served, as ``.served`` has them"""
    pruned: list[str]

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.drift is None or self.drift or self.switches or self.pruned)


class Store:
    """The releases below one folder and the link to the one that serves."""

    def __init__(self, root: str, link: str) -> None:
        """Take the folder and the link, both absolute paths; neither need exist."""
        for name, path in (("root", root), ("link", link)):
            if not Path(path).is_absolute():
                raise ReleaseError(f"{name} must be an absolute path, not {path!r}")
        self.root = Path(root)
        self.link = Path(link)
        if self.link.exists() and not self.link.is_symlink():
            raise ReleaseError(f"{link} exists and is not a link: move it away, its place is needed for the link")

    def ids(self) -> list[str]:
        """Ids of the releases on the disk."""
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if ID.fullmatch(entry.name) and entry.is_dir())

    def current(self) -> str | None:
        """Id that the link points at, if it points into this store."""
        if not self.link.is_symlink():
            return None
        target = self.link.readlink()
        return target.name if target.parent == self.root else None

    def served(self) -> list[str]:
        """Ids on the disk that serve or served, newest first; one that the link alone knows is the newest."""
        record = self.root / ".served"
        recorded = record.read_text().split() if record.exists() else []
        current = self.current()
        on_disk = set(self.ids())
        return [one for one in ([current] if current and current not in recorded else []) + recorded if one in on_disk]

    def has_served(self, release_id: str, in_use: tuple[str, ...]) -> bool:
        """Whether a release that the link points at came into service, so far as the files that name releases tell.

        Where they name others alone, its first program has failed and was put back.
        """
        named = self._named_in(in_use)
        return not named or release_id in named

    def drift(self, release_id: str, full: bool) -> dict[str, str] | None:
        """How a release differs from its manifest (see archive.compare); None when it is not here at all."""
        release = self.root / release_id
        if not release.is_dir():
            return None
        try:
            return compare(release, Manifest.load(release), full)
        except ArchiveError:
            return {MANIFEST: "edited"}

    def contents(self, release_id: str | None) -> dict[str, str]:
        """Contents of a release on the disk, for people; empty when there is none."""
        try:
            return Manifest.load(self.root / release_id).contents if release_id else {}
        except ArchiveError:
            return {}

    def expendable(self, served: list[str], wanted: Wanted) -> list[str]:
        """Releases that may go: older than the keep newest, not wanted, in no process and named by no file."""
        kept = {wanted.id, wanted.id if wanted.activate else self.current(), *served[: max(wanted.keep, 2)]}
        old = [one for one in self.ids() if one not in kept]
        if not old:
            return []
        busy = self._run_by_processes() | self._named_in(wanted.in_use)
        return [one for one in old if one not in busy]

    def _names_in(self, texts: Iterable[str]) -> set[str]:
        """Ids that appear in texts as a path below the store."""
        roots = "|".join({re.escape(str(self.root)), re.escape(str(self.root.resolve()))})
        pattern = re.compile(f"(?:{roots})/({ID.pattern})")
        return {name for text in texts for name in pattern.findall(text)}

    def _run_by_processes(self) -> set[str]:
        return self._names_in(_process_paths())

    def _named_in(self, patterns: Iterable[str]) -> set[str]:
        files = {file for pattern in patterns for file in Path("/").glob(pattern.lstrip("/"))}
        return self._names_in(file.read_text(errors="replace") for file in files)

    @contextmanager
    def changing(self) -> Iterator[Path]:
        """Hold the store alone and give an empty scratch folder on its file system; both end with the block."""
        new = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        handle = self._locked()
        scratch = self.root / ".tmp"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if not self.ids():
                for folder in new:
                    with suppress(OSError):
                        folder.rmdir()
            os.close(handle)  # not before: whoever waits must find the folder either whole or gone

    def _locked(self) -> int:
        """Wait until nobody else changes the store; return the handle that holds the lock."""
        while True:
            if self.root.is_file():
                raise ReleaseError(f"{self.root} is a file: move it away, its place is needed for releases")
            # Whoever holds it now may fail, and remove the folders that it had made, at any moment of this.
            with suppress(FileNotFoundError, FileExistsError):
                self.root.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.root, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), self.root.stat()):
                        return handle
                os.close(handle)

    def install(self, wanted: Wanted, scratch: Path) -> None:
        """Unpack the archive; put it in place whole, or mend the drifted release file by file under its users' feet."""
        assert wanted.archive
        if sha256(wanted.archive) != wanted.sha256:
            raise ReleaseError(f"the archive of {wanted.id} has not the sha256 {wanted.sha256}: nothing was changed")
        fresh = scratch / wanted.id
        manifest = unpack(wanted.archive, fresh)
        if manifest.id != wanted.id:
            raise ReleaseError(f"the archive holds release {manifest.id}, not {wanted.id}: nothing was changed")
        # a release that power loss turned into empty files would not be seen before its first start
        os.sync()
        release = self.root / wanted.id
        if release.is_dir():
            _mend(release, fresh, manifest, wanted.full)
        else:
            fresh.rename(release)

    def activate(self, release_id: str, served: list[str], scratch: Path) -> None:
        """Point the link at a release, atomically, and record the order."""
        record = scratch / "served"
        record.write_text("".join(f"{one}\n" for one in served))
        self.link.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.link.with_name(f".{self.link.name}.{os.getpid()}")
        unfinished.symlink_to(self.root / release_id)
        try:
            unfinished.replace(self.link)
        finally:
            unfinished.unlink(missing_ok=True)
        record.replace(self.root / ".served")

    def remove(self, release_id: str, scratch: Path) -> None:
        """Remove a release; it vanishes from the store at once, whatever happens while its files are deleted."""
        doomed = scratch / release_id
        (self.root / release_id).rename(doomed)
        shutil.rmtree(doomed)


def deploy(store: Store, wanted: Wanted, check: bool) -> dict[str, Any]:
    """Make the wanted release present, whole and (unless only prepared) current; return what was, or would be, done.

    ``needs_archive`` in the answer: the release is missing or drifted and no archive was given; nothing was changed.
    """
    if not ID.fullmatch(wanted.id):
        raise ReleaseError(f"{wanted.id!r} cannot be the id of a release: letters, digits, dot, dash, underscore")
    os.umask(0o022)
    plan = _plan(store, wanted)
    if plan.changes and not plan.needs_archive and not check:
        with store.changing() as scratch:
            # while this one waited for the lock, another run may have done it
            plan = _plan(store, wanted)
            _apply(store, wanted, plan, scratch)
    return {
        "id": wanted.id,
        "path": str(store.root / wanted.id),
        "current": plan.current,
        "previous": _next_older(plan.served, plan.current),
        "pruned": plan.pruned,
        "drift": _shown(plan.drift or {}),
        "changed": plan.changes,
        "needs_archive": plan.needs_archive,
    }


def contents_text(contents: dict[str, str]) -> str:
    """Contents as lines for --diff."""
    return "".join(f"{name} {version}\n" for name, version in sorted(contents.items()))


def _plan(store: Store, wanted: Wanted) -> Plan:
    before = store.current()
    served = store.served()
    switches = wanted.activate and before != wanted.id
    if switches and wanted.record:
        last = [before] if before and store.has_served(before, wanted.in_use) else []
        others = [*last, *(one for one in served if one != before)]
        served = [wanted.id, *(one for one in others if one != wanted.id)]
    drift = store.drift(wanted.id, wanted.full)
    return Plan(
        drift=drift,
        needs_archive=(drift is None or bool(drift)) and wanted.archive is None,
        switches=switches,
        current=wanted.id if wanted.activate else before,
        served=served,
        pruned=store.expendable(served, wanted),
    )


def _next_older(served: list[str], current: str | None) -> str | None:
    """The release that came into service before the current one."""
    older = served[served.index(current) + 1 :] if current in served else []
    return older[0] if older else None


def _apply(store: Store, wanted: Wanted, plan: Plan, scratch: Path) -> None:
    if plan.drift is None or plan.drift:
        store.install(wanted, scratch)
    if plan.switches:
        try:
            store.activate(wanted.id, plan.served, scratch)
        except OSError as error:
            if plan.drift is None and store.current() != wanted.id:
                store.remove(wanted.id, scratch)
            raise ReleaseError(f"{store.link} cannot be pointed at {wanted.id}: {error}") from error
    for release_id in plan.pruned:
        store.remove(release_id, scratch)


def _mend(release: Path, fresh: Path, manifest: Manifest, full: bool) -> None:
    """Replace what drifted by its fresh copy, each file atomically: programs may be running from here."""
    drift = compare(release, manifest, full)
    for path in reversed(drift):  # children before their folders
        if path not in manifest.files and path != MANIFEST:
            _delete(release / path)
    for path in drift:
        target = release / path
        if path in manifest.files and manifest.files[path].kind == "dir":
            _delete(target)
            target.mkdir()
        elif path in manifest.files:
            if target.is_dir() and not target.is_symlink():
                _delete(target)
            (fresh / path).replace(target)
    (fresh / MANIFEST).replace(release / MANIFEST)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _process_paths() -> Iterator[str]:
    """Programs, working directories and mapped files of all processes, as far as they may be read."""
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("exe", "cwd"):
            try:
                yield str((process / name).readlink())
            except OSError:
                continue  # ended meanwhile, or a kernel thread
        try:
            yield (process / "maps").read_text(errors="replace")
        except OSError:
            continue


def _shown(drift: dict[str, str]) -> list[str]:
    lines = [f"{path}: {how}" for path, how in drift.items()]
    more = len(lines) - _DRIFT_SHOWN
    return [*lines[:_DRIFT_SHOWN], f"... and {more} more"] if more > 0 else lines

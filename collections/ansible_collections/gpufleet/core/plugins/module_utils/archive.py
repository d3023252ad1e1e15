"""The archive of a release: a deterministic tar whose first member lists every other one.

Written on the controller (L(pack)), unpacked and checked on the hosts (L(unpack), L(compare)); standard library only,
Python 3.9 or newer. The same tree gives the same bytes: paths are sorted, owners, modes and times are fixed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

MANIFEST = ".release.json"
"""Name of the manifest in the archive, and in the release on the host."""

EPOCH = 315532800
"""Modification time of every file of a release: 1980-01-01, the first day that zip files (wheels) can express."""

FORMATS = ("tar.gz", "tar.zst")
"""What an archive can be; tar.zst needs the program zstd on both sides."""

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20


class ArchiveError(Exception):
    """The archive, or what lies on the disk, is not what it should be; the message is for the operator."""


class Entry(NamedTuple):
    """What the manifest says of one path."""

    kind: str
    """file, dir or link"""
    size: int = 0
    """bytes of a file, else 0"""
    executable: bool = False
    digest: str = ""
    """sha256 of a file, target of a link"""


class Manifest(NamedTuple):
    """Everything that a release holds."""

    name: str
    id: str
    contents: dict[str, str]
    """What people call its parts: package -> version for an environment, file -> digest for code."""
    files: dict[str, Entry]

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Read a manifest; ArchiveError when it is none, or when a path would leave the release."""
        try:
            data = json.loads(text)
            files = {path: Entry(*entry) for path, entry in data["files"].items()}
            manifest = cls(data["name"], data["id"], data["contents"], files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArchiveError(f"the manifest cannot be read: {error}") from error
        for path in files:
            if path.startswith("/") or not path or {"", ".", ".."} & set(path.split("/")):
                raise ArchiveError(f"the manifest lists {path!r}, which is not a path inside the release")
        return manifest

    @classmethod
    def load(cls, release: Path) -> Manifest:
        """Read the manifest of a release on the disk."""
        try:
            return cls.parse((release / MANIFEST).read_bytes())
        except OSError as error:
            raise ArchiveError(f"the manifest cannot be read: {error}") from error

    def text(self) -> bytes:
        """The manifest as it is stored."""
        return json.dumps(self._asdict(), sort_keys=True, separators=(",", ":")).encode()

    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())


def sha256(path: Path) -> str:
    """Hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def walk(tree: Path, skip: frozenset[str] = frozenset()) -> dict[str, Path]:
    """Every path below a folder, folders included, by its name relative to it; names in L(skip) are left out."""
    found: dict[str, Path] = {}
    for base, folders, files in os.walk(tree):
        folders[:] = [name for name in folders if name not in skip]
        for name in (*folders, *files):
            if name not in skip:
                path = Path(base, name)
                found[path.relative_to(tree).as_posix()] = path
    return found


def describe(path: Path) -> Entry:
    """The manifest entry of a path on the disk; ArchiveError for sockets, devices and the like."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return Entry("link", digest=str(path.readlink()))
    if stat.S_ISDIR(status.st_mode):
        return Entry("dir")
    if stat.S_ISREG(status.st_mode):
        return Entry("file", status.st_size, bool(status.st_mode & stat.S_IXUSR), sha256(path))
    raise ArchiveError(f"{path} is neither a file, a folder nor a link")


def sidecar_path(archive: Path) -> Path:
    """The JSON file beside an archive: id, sha256 and contents, known without opening the archive."""
    for suffix in FORMATS:
        if archive.name.endswith(f".{suffix}"):
            return archive.with_name(archive.name[: -len(suffix)] + "json")
    raise ArchiveError(f"{archive} is not one of {', '.join(FORMATS)}")


def write_sidecar(archive: Path, manifest_id: str, contents: Mapping[str, str], sha: str | None) -> None:
    """Write the sidecar; sha is None while the archive is only planned."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    document = {"id": manifest_id, "archive": archive.name, "sha256": sha, "contents": dict(contents)}
    _write(sidecar_path(archive), json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")


def read_sidecar(archive: Path) -> dict[str, Any] | None:
    """The sidecar of an archive, or None when there is none."""
    path = sidecar_path(archive)
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def is_packed(archive: Path) -> bool:
    """Whether the archive lies there whole, as its sidecar says."""
    sidecar = read_sidecar(archive)
    return bool(sidecar and archive.exists() and sidecar["sha256"] == sha256(archive))


def pack(
    archive: Path, name: str, release_id: str, sources: Mapping[str, Path], contents: Mapping[str, str] | None = None
) -> str:
    """Pack the paths of L(sources) (name in the release -> path on the disk), write the sidecar, return the sha256.

    Without L(contents) the files themselves are the contents. The archive appears under its name only when it is whole.
    """
    files = {path: describe(source) for path, source in sorted(sources.items())}
    if contents is None:
        contents = {path: _short(entry) for path, entry in files.items() if entry.kind != "dir"}
    manifest = Manifest(name, release_id, dict(contents), files)
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_name(f".{archive.name}.{os.getpid()}")
    try:
        with _compressed(unfinished, archive.name) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            text = manifest.text()
            tar.addfile(_member(MANIFEST, Entry("file", len(text))), io.BytesIO(text))
            for path, entry in files.items():
                if entry.kind == "file":
                    with sources[path].open("rb") as file:
                        tar.addfile(_member(path, entry), file)
                else:
                    tar.addfile(_member(path, entry))
        digest = sha256(unfinished)
        unfinished.replace(archive)
    finally:
        unfinished.unlink(missing_ok=True)
    write_sidecar(archive, release_id, contents, digest)
    return digest


def unpack(archive: Path, destination: Path) -> Manifest:
    """Unpack into a new folder, check every file against the manifest on the way; ArchiveError at the first fault."""
    destination.mkdir(parents=True)
    destination.chmod(0o755)
    with _opened(archive) as tar:
        first = tar.next()
        if first is None or first.name != MANIFEST:
            raise ArchiveError(f"{archive} does not begin with {MANIFEST}")
        text = _content(tar, first).read()
        manifest = Manifest.parse(text)
        _require_space(destination, manifest.size())
        missing = dict(manifest.files)
        for member in iter(tar.next, None):
            entry = missing.pop(member.name, None)
            if entry is None:
                raise ArchiveError(f"{archive} holds {member.name}, which its manifest does not list once more")
            # links are made last: until then no path can lead out of the folder
            if entry.kind == "dir":
                (destination / member.name).mkdir()
                (destination / member.name).chmod(0o755)
            elif entry.kind == "file":
                _write_checked(destination / member.name, entry, _content(tar, member))
        if missing:
            raise ArchiveError(f"{archive} lacks {sorted(missing)[0]}, which its manifest lists")
    for path, entry in manifest.files.items():
        if entry.kind == "link":
            (destination / path).symlink_to(entry.digest)
    manifest_entry = Entry("file", len(text), False, hashlib.sha256(text).hexdigest())
    _write_checked(destination / MANIFEST, manifest_entry, io.BytesIO(text))
    return manifest


def compare(release: Path, manifest: Manifest, full: bool) -> dict[str, str]:
    """How a release on the disk differs from its manifest: path -> missing, added or edited.

    Quick (not full) looks at type, size, executable bit and modification time; full reads and hashes every file.
    """
    found = walk(release)
    drift = dict.fromkeys(found.keys() - manifest.files.keys() - {MANIFEST}, "added")
    for path, entry in manifest.files.items():
        if path not in found:
            drift[path] = "missing"
        elif not _is_whole(found[path], entry, full):
            drift[path] = "edited"
    if MANIFEST not in found or int(found[MANIFEST].lstat().st_mtime) != EPOCH:
        drift[MANIFEST] = "edited"
    return dict(sorted(drift.items()))


def _is_whole(path: Path, entry: Entry, full: bool) -> bool:
    status = path.lstat()
    if entry.kind == "dir":
        return stat.S_ISDIR(status.st_mode)
    if entry.kind == "link":
        return stat.S_ISLNK(status.st_mode) and str(path.readlink()) == entry.digest
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_size == entry.size
        and bool(status.st_mode & stat.S_IXUSR) == entry.executable
        and int(status.st_mtime) == EPOCH
        and (not full or sha256(path) == entry.digest)
    )


def _write(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _short(entry: Entry) -> str:
    return f"-> {entry.digest}" if entry.kind == "link" else entry.digest[:12]


def _member(path: str, entry: Entry) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.mtime = EPOCH
    member.type = {"file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}[entry.kind]
    member.mode = 0o755 if entry.executable or entry.kind != "file" else 0o644
    member.size = entry.size
    member.linkname = entry.digest if entry.kind == "link" else ""
    return member


@contextmanager
def _compressed(path: Path, name: str) -> Iterator[IO[bytes]]:
    """A stream that compresses into path, in the format that the name asks for."""
    if name.endswith(".tar.zst"):
        command = [_zstd(), "-q", "-3", "-T0", "-o", str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            assert process.stdin
            yield process.stdin
        if process.returncode:
            raise ArchiveError(f"zstd ended with {process.returncode} while it wrote {path}")
    else:
        with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0, compresslevel=6) as stream:
            yield cast("IO[bytes]", stream)


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """The tar in an archive, whichever way it is compressed; what is damaged is an ArchiveError."""
    try:
        with archive.open("rb") as file:
            is_zstd = file.read(4) == _ZSTD_MAGIC
        if not is_zstd:
            with tarfile.open(archive, "r|gz") as tar:
                yield tar
            return
        command = [_zstd(), "-dcq", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as zstd, tarfile.open(None, "r|", zstd.stdout) as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ArchiveError(f"{archive} cannot be unpacked: {error}") from error


def _zstd() -> str:
    program = shutil.which("zstd")
    if program is None:
        raise ArchiveError("the archive is .tar.zst and there is no program zstd here: install the package zstd")
    return program


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member) if member.isreg() else None
    if content is None:
        raise ArchiveError(f"{member.name} in the archive is not a file, as its manifest says")
    return content


def _write_checked(path: Path, entry: Entry, content: IO[bytes]) -> None:
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for chunk in iter(lambda: content.read(_CHUNK), b""):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != entry.digest:
        raise ArchiveError(f"{path.name} in the archive is not the file that its manifest lists: the hash differs")
    path.chmod(0o755 if entry.executable else 0o644)
    os.utime(path, (EPOCH, EPOCH))


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArchiveError(f"{folder} has {free >> 20} MiB free and the release needs {needed >> 20} MiB")

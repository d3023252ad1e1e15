"""A conda channel made of this machine's CPython, for demo and tests where conda-forge does not answer.

It holds packages python, pip and one per shared library that python needs beyond glibc; so an environment made of it
runs on hosts that have none of them. rattler reads it through its mirror setting, exactly as it reads a real mirror.

    python -m testbed.conda_channel FOLDER [--python /usr/bin/python3]
"""

from __future__ import annotations

import argparse
import asyncio
import bz2
import hashlib
import io
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.parser import HeaderParser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

GLIBC = re.compile(r"(ld-linux.*|linux-vdso|lib(c|m|dl|rt|util|pthread|resolv))\.so.*")
"""Libraries that the hosts have: glibc's own."""

LEFT_OUT = re.compile(
    r"(test|idlelib|turtledemo|tkinter|ensurepip|config-.*|site-packages|dist-packages|__pycache__|sitecustomize\.py"
    r"|(_tkinter|nis|_test.*|_ctypes_test|_xxtestfuzz|xx.*)\.cpython-.*|EXTERNALLY-MANAGED)"
)
"""Names in the standard library's folder that are not packaged: tests, windows, and what is not part of it."""

PLACEHOLDER = "/" + "_placeholder" * 20
"""Stands for the prefix in text files until the package is linked."""


class Interpreter(NamedTuple):
    """What the packages are made of."""

    executable: Path
    version: str
    prefix: str
    stdlib: Path

    @property
    def minor(self) -> str:
        """The version's first two numbers: 3.11."""
        return ".".join(self.version.split(".")[:2])


class File(NamedTuple):
    """A file of a package: what it holds, or what it links to."""

    data: bytes
    executable: bool = False
    link: str = ""
    has_prefix: bool = False


class Package(NamedTuple):
    """A conda package before it is written."""

    name: str
    version: str
    depends: list[str]
    files: dict[str, File]
    noarch: bool = False


def build(folder: Path, python: Path) -> bool:
    """Make the channel in a folder, unless it is there and made of the same; return whether it was made."""
    interpreter = inspect(python)
    made_of = _fingerprint(interpreter)
    mark = folder / "made-of"
    if mark.exists() and mark.read_text() == made_of:
        return False
    write_channel(folder, [*python_packages(interpreter), _pip_package(interpreter)])
    mark.write_text(made_of)
    return True


def write_channel(folder: Path, packages: list[Package]) -> None:
    """Make a channel that holds these packages."""
    shutil.rmtree(folder, ignore_errors=True)
    subdir = _subdir()
    for name in (subdir, "noarch"):
        (folder / name).mkdir(parents=True)
    with ThreadPoolExecutor() as pool:  # bz2 releases the interpreter lock
        list(pool.map(lambda package: _write(package, folder / ("noarch" if package.noarch else subdir)), packages))
    _index(folder)


def inspect(python: Path) -> Interpreter:
    """Ask an interpreter about itself; the one that a virtual environment was made of is meant."""
    question = (
        "import json, os, sys, sysconfig as s; print(json.dumps([os.path.realpath(sys._base_executable), "
        "s.get_python_version() + '.' + str(sys.version_info.micro), sys.base_prefix, os.path.dirname(os.__file__)]))"
    )
    executable, version, prefix, stdlib = json.loads(_output(str(python), "-I", "-c", question))
    return Interpreter(Path(executable), version, prefix, Path(stdlib))


def python_packages(interpreter: Interpreter) -> list[Package]:
    """Package an interpreter and, each on its own, the shared libraries that hosts may lack."""
    libraries = _libraries(interpreter)
    return [
        _python_package(interpreter, libraries),
        *(_library_package(name, path, libraries) for name, path in libraries.items() if not _is_pythons(name)),
    ]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder on the loopback interface while the block runs; gives the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are rattler's own business."""


def _fingerprint(interpreter: Interpreter) -> str:
    status = interpreter.executable.stat()
    made_of = [*map(str, interpreter), status.st_size, status.st_mtime, Path(__file__).read_text()]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _libraries(interpreter: Interpreter) -> dict[str, Path]:
    """Shared libraries that the interpreter and its modules need, by the name they are asked for (ldd resolves all)."""
    modules = [path for path in (interpreter.stdlib / "lib-dynload").glob("*.so") if not LEFT_OUT.fullmatch(path.name)]
    found = re.findall(r"^\s+(\S+) => (/\S+)", _output("ldd", str(interpreter.executable), *map(str, modules)), re.M)
    return {name: Path(path).resolve() for name, path in sorted(found) if not GLIBC.fullmatch(name)}


def _python_package(interpreter: Interpreter, libraries: dict[str, Path]) -> Package:
    short = f"python{interpreter.minor}"
    files = {
        f"bin/{short}": _program(interpreter.executable, "$ORIGIN/../lib"),
        "bin/python3": File(b"", link=short),
        "bin/python": File(b"", link=short),
        f"lib/{short}/site-packages/README.txt": File(b"Packages of this environment.\n"),
        # Debian's python looks for packages elsewhere (dist-packages); others add the same folder once more
        f"lib/{short}/sitecustomize.py": File(
            f'import site\nimport sys\n\nsite.addsitedir(f"{{sys.prefix}}/lib/{short}/site-packages")\n'.encode()
        ),
    }
    for path in _stdlib_files(interpreter.stdlib):
        name = f"lib/{short}/{path.relative_to(interpreter.stdlib).as_posix()}"
        if path.suffix == ".so":
            files[name] = _program(path, "$ORIGIN/../..")
        elif path.name.startswith("_sysconfigdata"):
            text = path.read_text().replace(f"'{interpreter.prefix}", f"'{PLACEHOLDER}")
            files[name] = File(text.encode(), has_prefix=True)
        else:
            files[name] = File(path.read_bytes())
    files |= {f"lib/{name}": _program(path, "$ORIGIN") for name, path in libraries.items() if _is_pythons(name)}
    needed = [_package_name(name) for name in libraries if not _is_pythons(name)]
    return Package("python", interpreter.version, [f"__glibc >={platform.libc_ver()[1]}", *needed], files)


def _stdlib_files(stdlib: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(stdlib):
        folders[:] = sorted(name for name in folders if not LEFT_OUT.fullmatch(name))
        yield from (Path(base, name) for name in sorted(names) if not LEFT_OUT.fullmatch(name))


def _library_package(name: str, path: Path, libraries: dict[str, Path]) -> Package:
    needed = _output(_patchelf(), "--print-needed", str(path)).split()
    depends = [_package_name(other) for other in needed if other in libraries]
    version = re.sub(r"[^0-9.]", "", path.name.partition(".so")[2]).strip(".") or "0"
    return Package(_package_name(name), version, depends, {f"lib/{name}": _program(path, "$ORIGIN")})


def _pip_package(interpreter: Interpreter) -> Package:
    """Package pip, which environment files name beside their pip: part, made of its wheel."""
    with tempfile.TemporaryDirectory() as folder:
        _output(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "pip")
        with zipfile.ZipFile(next(Path(folder).glob("pip-*.whl"))) as wheel:
            files = {f"site-packages/{name}": File(wheel.read(name)) for name in wheel.namelist()}
    metadata = next(file.data for name, file in files.items() if name.endswith(".dist-info/METADATA"))
    version = HeaderParser().parsestr(metadata.decode())["Version"]
    entry_points = {"type": "python", "entry_points": ["pip = pip._internal.cli.main:main"]}
    files["info/link.json"] = File(json.dumps({"noarch": entry_points, "package_metadata_version": 1}).encode())
    return Package("pip", version, [f"python >={interpreter.minor}"], files, noarch=True)


def _program(path: Path, search: str) -> File:
    """An ELF file that finds its libraries by a path relative to itself."""
    with tempfile.NamedTemporaryFile() as copy:
        shutil.copyfile(path, copy.name)
        _output(_patchelf(), "--set-rpath", search, copy.name)
        return File(Path(copy.name).read_bytes(), executable=bool(path.stat().st_mode & stat.S_IXUSR))


def _write(package: Package, folder: Path) -> None:
    """Write a package as .tar.bz2, the same bytes for the same files, so that locks stay true when it is made again."""
    digest = hashlib.sha256(repr(sorted(package.files.items())).encode()).hexdigest()[:8]
    build_string = f"{'py' if package.noarch else 'h'}{digest}_0"
    index = {
        "name": package.name,
        "version": package.version,
        "build": build_string,
        "build_number": 0,
        "depends": package.depends,
        "subdir": folder.name,
        "timestamp": 1577836800000,
        **({"noarch": "python"} if package.noarch else {}),
    }
    paths = [_path_entry(name, file) for name, file in sorted(package.files.items()) if not name.startswith("info/")]
    files = {
        **package.files,
        "info/index.json": File(json.dumps(index, sort_keys=True).encode()),
        "info/paths.json": File(json.dumps({"paths_version": 1, "paths": paths}, sort_keys=True).encode()),
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, file in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE if file.link else tarfile.REGTYPE
            member.linkname, member.size = file.link, len(file.data)
            member.mode = 0o755 if file.executable or file.link else 0o644
            tar.addfile(member, io.BytesIO(file.data))
    archive = folder / f"{package.name}-{package.version}-{build_string}.tar.bz2"
    archive.write_bytes(bz2.compress(packed.getvalue(), 1))


def _path_entry(name: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "_path": name,
        "path_type": "softlink" if file.link else "hardlink",
        "sha256": hashlib.sha256(file.data).hexdigest(),
        "size_in_bytes": len(file.data),
    }
    if file.has_prefix:
        entry |= {"prefix_placeholder": PLACEHOLDER, "file_mode": "text"}
    return entry


def _index(folder: Path) -> None:
    """Write repodata.json; no shards, which plain file servers do not serve as rattler expects."""
    from rattler.index import index_fs

    asyncio.run(index_fs(folder, write_zst=False, write_shards=False))


def _is_pythons(library: str) -> bool:
    return library.startswith("libpython")


def _package_name(library: str) -> str:
    return library.partition(".so")[0].lower()


def _subdir() -> str:
    from rattler import Subdir

    return str(Subdir.current())


def _patchelf() -> str:
    program = Path(sys.executable).with_name("patchelf")
    if not program.exists():
        raise SystemExit(f"{program} is missing: install the Python package patchelf, which requirements.txt lists")
    return str(program)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a conda channel of this machine's CPython.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter to package")
    arguments = parser.parse_args()
    made = build(arguments.folder, arguments.python)
    print(f"{arguments.folder}: {'made' if made else 'there'}")


if __name__ == "__main__":
    main()
    # py-rattler 0.28 crashes now and then while the interpreter ends, long after its work is done
    sys.stdout.flush()
    os._exit(0)

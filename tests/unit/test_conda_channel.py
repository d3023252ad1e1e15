"""testbed.conda_channel: this machine's Python as packages that bring all they need."""

import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from testbed.conda_channel import PLACEHOLDER, inspect, python_packages, serving


@pytest.mark.parametrize("python", [sys.executable, "/usr/bin/python3"], ids=["own", "debian"])
def test_a_python_brings_its_libraries_and_finds_its_packages(tmp_path, python):
    interpreter = inspect(Path(python))
    packages = python_packages(interpreter)
    for package in packages:
        for name, file in package.files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.link:
                path.symlink_to(file.link)
            else:
                path.write_bytes(file.data.replace(PLACEHOLDER.encode(), bytes(tmp_path)))
                path.chmod(0o755 if file.executable else 0o644)
    by_name = {package.name: package for package in packages}
    assert by_name["python"].version == interpreter.version
    assert {"libssl", "libsqlite3", "libffi"} <= {depend.split()[0] for depend in by_name["python"].depends}
    assert "libcrypto" in by_name["libssl"].depends

    code = "import ssl, sqlite3, ctypes, sys; print(*sys.path); print(open('/proc/self/maps').read())"
    command = [tmp_path / "bin/python", "-c", code]
    said = subprocess.run(command, env={}, check=True, capture_output=True, text=True).stdout
    site_packages = tmp_path / f"lib/python{interpreter.minor}/site-packages"
    assert str(site_packages) in said.splitlines()[0].split()
    loaded = {name for name in re.findall(r"/\S+\.so\S*", said) if not name.startswith(str(tmp_path))}
    glibc = re.compile(r"(ld-linux|libc|libm|libdl|libpthread|librt|libutil)[-.]")
    assert all(glibc.match(Path(name).name) for name in loaded)


def test_serving_is_plain_http_on_loopback(tmp_path):
    (tmp_path / "x").write_text("content")
    with serving(tmp_path) as url:
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}/x") as answer:
            assert answer.read() == b"content"

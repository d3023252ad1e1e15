"""tools.condaenv: what is refused, and one environment locked, built and started for real.

rattler runs in processes of its own, as it does in production: it may crash when its interpreter ends.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.gpufleet.core.plugins.module_utils.archive import compare, sha256, unpack
from ansible_collections.gpufleet.core.plugins.module_utils.release_ids import conda_release

from testbed import envs
from testbed.conda_channel import serving
from tools.condaenv import CondaError
from tools.condaenv.environment import read_environment
from tools.condaenv.wheels import require_glibc

PROJECT = Path(__file__).parents[2]
HOME = PROJECT / ".cache" / "unit-condaenv"
"""Kept between runs: made anew only when what it is made of changes."""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty or not a mapping"),
        ("[", "cannot be read"),
        ("channels: [conda-forge]", "no conda package is asked for"),
        ("dependencies: [python]", "names none, which means defaults"),
        ("channels: [defaults]\ndependencies: [python]", "names defaults.*need a licence"),
        ("channels: [conda-forge, defaults]\ndependencies: [python]", "names conda-forge, defaults"),
        ("channels: [conda-forge, pytorch]\ndependencies: [python]", "names conda-forge, pytorch"),
        ("channels: ['https://mirror.example/conda-forge']\ndependencies: [python]", "set conda_env_mirror"),
        ("channels: [conda-forge]\ndependencies: ['defaults::python']", "defaults::python names a channel"),
        ("channels: [conda-forge]\ndependencies: ['numpy[channel=x]']", "names a channel"),
        ("channels: [conda-forge]\nprefix: /x\ndependencies: [python]", "prefix is not understood"),
        ("channels: [conda-forge]\ndependencies: [python, {pip: [x]}, {pip: [y]}]", "at most one section, pip:"),
        ("channels: [conda-forge]\ndependencies: [python, {npm: [x]}]", "at most one section, pip:"),
        ("channels: [conda-forge]\ndependencies: [python, {pip: ['-r x.txt']}]", "'-r x.txt' is not a requirement"),
        ("channels: [conda-forge]\ndependencies: [python, {pip: ['./x']}]", "'./x' is not a requirement"),
        ("channels: [conda-forge]\ndependencies: [python, {pip: ['x @ https://x.example/x.whl']}]", "is a URL"),
    ],
)
def test_an_environment_that_no_lock_could_honour_is_refused(tmp_path, text, fault):
    (tmp_path / "environment.yml").write_text(text)
    with pytest.raises(CondaError, match=fault):
        read_environment(tmp_path / "environment.yml")


def test_an_environment_is_read(tmp_path):
    path = tmp_path / "environment.yml"
    path.write_text("name: x\nchannels: [conda-forge, nodefaults]\ndependencies: [python=3.10, pip, {pip: ['x>=1']}]\n")
    assert read_environment(path) == (["python=3.10", "pip"], ["x>=1"])


@pytest.mark.parametrize(
    ("tag", "runs"),
    [
        ("py3-none-any", True),
        ("cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64", True),
        ("cp311-cp311-manylinux_2_31_x86_64", True),
        ("cp311-cp311-manylinux_2_34_x86_64", False),
        ("cp311-cp311-manylinux_2_34_x86_64.manylinux_2_28_x86_64", True),
    ],
)
def test_wheels_that_the_hosts_glibc_cannot_load_are_refused(tag, runs):
    if runs:
        require_glibc(f"x-1-{tag}.whl", "2.31")
    else:
        with pytest.raises(CondaError, match=r"needs glibc 2.34 and the fleet has 2.31.*--virtual __glibc=2.34"):
            require_glibc(f"x-1-{tag}.whl", "2.31")


@functools.cache
def locked():
    """A lock folder of Python and Gunicorn from this machine's channel, and its archive built."""
    HOME.mkdir(parents=True, exist_ok=True)
    wanted = HOME / "environment.yml"
    wanted.write_text("channels: [conda-forge]\ndependencies: [python=3.10, pip, {pip: [gunicorn>=27]}]\n")
    mark = HOME / "made-of"
    made_of = envs._fingerprint(wanted, str(HOME))
    if not mark.exists() or mark.read_text() != made_of:
        for made in (".cache", "dist", "again"):
            shutil.rmtree(HOME / made, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, "_conda_forge_answers", lambda: False)
        folder = envs.prepare("unit", wanted, HOME, str(HOME / "conda"))
    mark.write_text(made_of)
    return folder


@pytest.fixture
def lock(tmp_path):
    """A copy of the lock folder, to be spoilt."""
    shutil.copytree(locked(), tmp_path / "lock")
    return tmp_path / "lock"


def release():
    """Places of the release; its root is a folder of this machine, so that it can be started."""
    return conda_release("unit", str(locked()), str(HOME / "conda"), str(HOME))


def build(project, folder, channel=HOME / ".cache" / "conda-channel", *options):
    """Build a lock folder in a project of its own, the channel served as conda-forge's mirror."""
    with serving(channel) as mirror:
        command = [sys.executable, "-m", "tools.condaenv", "build", "unit", folder, "--root", HOME / "conda"]
        command += ["--project", project, "--mirror", mirror, *options]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


def test_the_lock_names_conda_forge_and_not_the_mirror():
    text = (locked() / "conda.lock").read_text()
    urls = re.findall(r"^- conda: (\S+)$", text, re.M)
    assert any("/conda-forge/linux-" in url and "/python-3." in url for url in urls)
    assert all(url.startswith("https://") and "/conda-forge/" in url for url in urls)
    assert len(re.findall(r"^  sha256: [0-9a-f]{64}$", text, re.M)) == len(urls)
    assert "127.0.0.1" not in text
    for line in (locked() / "pip.lock").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line)


def test_the_demos_environment_asks_for_this_machines_python():
    text = "dependencies: ['python >=3.9,<4', python-dateutil, {pip: [python-multipart]}]"
    wanted = {"dependencies": ["python=3.12", "python-dateutil", {"pip": ["python-multipart"]}]}
    assert yaml.safe_load(envs._with_python(text, "3.12")) == wanted
    assert envs._with_python(text, "") == text


def test_a_second_build_does_nothing():
    done = build(HOME, locked())
    answer = json.loads(done.stdout)
    assert not answer["changed"]
    assert answer["id"] == release()["id"] and answer["archive"] == release()["archive"]
    assert answer["sha256"] == sha256(Path(release()["archive"]))
    assert answer["packages"]["gunicorn"].endswith("(pip)") and answer["packages"]["python"].startswith("3.")


def test_a_build_elsewhere_with_a_tampered_package_cache_gives_the_same_bytes():
    locked()
    project = HOME / "again"
    cache = project / ".cache/condaenv/packages"
    if not project.exists():
        shutil.copytree(HOME / ".cache/condaenv/packages", cache, symlinks=True)
        victim = next(cache.glob("python-3*/lib/python3*/this.py"))
        victim.write_bytes(victim.read_bytes()[::-1])
    done = build(project, locked())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sha256"] == sha256(Path(release()["archive"]))
    assert [path.name for path in cache.parent.iterdir()] == ["packages"]


def test_a_plan_knows_id_and_packages_without_building(tmp_path):
    answer = json.loads(build(tmp_path, locked(), HOME, "--plan").stdout)
    assert answer["changed"] and answer["sha256"] is None and answer["id"] == release()["id"]
    assert [path.suffix for path in (tmp_path / "dist").iterdir()] == [".json"]


def test_the_environment_runs_from_its_place_and_stays_as_it_is():
    path = Path(release()["path"])
    shutil.rmtree(path, ignore_errors=True)
    manifest = unpack(Path(release()["archive"]), path)

    def run(*command):
        bare = {"PATH": "/usr/bin:/bin"}  # as Supervisor starts it
        return subprocess.run(command, env=bare, capture_output=True, text=True)

    assert (path / "bin/gunicorn").read_text().startswith(f"#!{path}/bin/python3")
    assert run(path / "bin/gunicorn", "--version").stdout.startswith("gunicorn (version 2")
    code = "import bz2, ctypes, lzma, sqlite3, ssl, sysconfig; print(sysconfig.get_config_var('prefix')); "
    said = run(path / "bin/python", "-c", code + "print(open('/proc/self/maps').read())").stdout
    assert said.splitlines()[0] == str(path)
    for library in ("libssl", "libsqlite3", "libffi", "liblzma"):
        loaded = re.findall(rf"/\S*/{library}\.so\S*", said)
        assert loaded and all(name.startswith(f"{path}/lib/") for name in loaded)
    refused = run(path / "bin/python", "-m", "pip", "install", "x")
    assert refused.returncode != 0 and "gpufleet deploys this environment as a whole" in refused.stderr
    assert json.loads((path / "conda-meta/frozen").read_text())["message"].startswith("gpufleet deploys")
    assert str(HOME / ".cache") not in "".join(file.read_text() for file in path.glob("conda-meta/*.json"))
    assert compare(path, manifest, full=True) == {}


def spoil_package(lock, channel):
    package = next(channel.glob("linux-*/libz-*"))
    data = package.read_bytes()
    package.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # padding of bzip2: it unpacks as before


def spoil_wheel(lock, channel):
    text = (lock / "pip.lock").read_text()
    (lock / "pip.lock").write_text(re.sub(r"sha256:\w{4}", "sha256:0000", text))


def use_files(lock, channel):
    text = (lock / "conda.lock").read_text()
    (lock / "conda.lock").write_text(re.sub(r"https://\S*/conda-forge/", f"file://{channel}/", text))


def forget_hashes(lock, channel):
    text = (lock / "conda.lock").read_text()
    (lock / "conda.lock").write_text(re.sub(r"^  sha256: .*\n", "", text, flags=re.M))


def lose_lock(lock, channel):
    (lock / "conda.lock").unlink()


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (spoil_package, "hash mismatch"),
        (spoil_wheel, "DO NOT MATCH THE HASHES"),
        (use_files, "would not be checked against its sha256"),
        (forget_hashes, "holds no lock that can be read"),
        (lose_lock, "make it with python -m tools.condaenv lock"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_what_was_locked_is_refused(lock, tmp_path, spoil, fault):
    channel = tmp_path / "channel"
    shutil.copytree(HOME / ".cache" / "conda-channel", channel)
    spoil(lock, channel)
    done = build(tmp_path, lock, channel)
    assert done.returncode == 1 and re.search(fault, done.stderr), done.stderr
    assert done.stderr.startswith("condaenv: ") and not list(tmp_path.glob("dist/*"))


def test_packages_with_link_scripts_are_refused(tmp_path):
    make = (
        "import sys; from pathlib import Path; from testbed.conda_channel import *; "
        "script = {'bin/.scripted-post-link.sh': File(b'exit 0', executable=True)}; "
        "write_channel(Path(sys.argv[1]), [Package('scripted', '1', [], script)]); "
        "sys.stdout.flush(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", make, tmp_path / "channel"], cwd=PROJECT, check=True)
    (tmp_path / "environment.yml").write_text("channels: [conda-forge]\ndependencies: [scripted]\n")
    with serving(tmp_path / "channel") as mirror:
        command = [sys.executable, "-m", "tools.condaenv", "lock", tmp_path, "--project", tmp_path, "--mirror", mirror]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 1 and ".scripted-post-link.sh: packages that run a script" in done.stderr
    assert not (tmp_path / "conda.lock").exists()


def test_an_environment_that_cannot_be_solved_is_told_plainly(tmp_path):
    (tmp_path / "environment.yml").write_text("channels: [conda-forge]\ndependencies: [python=2.7]\n")
    with serving(HOME / ".cache" / "conda-channel") as mirror:
        command = [sys.executable, "-m", "tools.condaenv", "lock", tmp_path, "--project", tmp_path, "--mirror", mirror]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 1 and done.stderr.startswith("condaenv: ") and "python" in done.stderr

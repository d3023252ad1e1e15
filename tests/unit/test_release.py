"""Releases on a host: brought once, switched atomically, mended, rolled back, removed only when nobody needs them."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from ansible_collections.gpufleet.core.plugins.module_utils.archive import MANIFEST, ArchiveError, pack, sha256, walk
from ansible_collections.gpufleet.core.plugins.module_utils.release import ReleaseError, Store, Wanted, deploy

PROJECT = Path(__file__).parents[2]


class Host:
    """A host's folder, and the controller's folder of archives."""

    def __init__(self, folder):
        self.dist = folder / "dist"
        self.root = folder / "host" / "releases"
        self.link = folder / "host" / "current"

    def archive(self, release_id):
        """Pack a release: a library, a script, a link, a folder; the id is in its files."""
        tree = self.dist / release_id
        (tree / "lib").mkdir(parents=True, exist_ok=True)
        (tree / "lib" / "app.py").write_text(f"VERSION = '{release_id}'\n")
        (tree / "run").write_text("#!/bin/sh\n")
        (tree / "run").chmod(0o755)
        if not (tree / "app.py").is_symlink():
            (tree / "app.py").symlink_to("lib/app.py")
        archive = self.dist / f"code-x-{release_id}.tar.gz"
        pack(archive, "x", release_id, walk(tree))
        return archive

    def deploy(self, release_id, *, check=False, bring=True, digest=None, **options):
        """Deploy a release as module and action plugin do."""
        archive = self.archive(release_id) if bring else None
        digest = digest or (archive and sha256(archive))
        wanted = Wanted(release_id, archive, digest, **options)
        return deploy(Store(str(self.root), str(self.link)), wanted, check)

    def files(self):
        """All that is on the host."""
        return walk(self.root.parent)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_first_deployment_then_nothing_to_do(host):
    old_mask = os.umask(0o077)
    result = host.deploy("a")
    os.umask(old_mask)
    assert result["changed"] and result["current"] == "a" and result["previous"] is None
    assert result["path"] == str(host.root / "a")
    assert (host.link / "app.py").read_text() == "VERSION = 'a'\n"
    assert host.root.stat().st_mode & 0o777 == 0o755
    again = host.deploy("a", bring=False)
    assert not again["changed"] and not again["needs_archive"] and again["current"] == "a"
    assert sorted(path.name for path in host.root.iterdir()) == [".served", "a"]


def test_check_mode_on_a_bare_host_tells_and_leaves_nothing(host):
    result = host.deploy("a", check=True)
    assert result["changed"] and result["current"] == "a"
    assert host.deploy("a", check=True, bring=False)["needs_archive"]
    assert not host.root.parent.exists()


@pytest.mark.parametrize("fault", ["sha256", "truncated", "other id", "link"])
def test_a_failed_deployment_leaves_the_host_as_it_was(host, fault):
    host.deploy("a")
    before = {name: path.lstat().st_mtime_ns for name, path in host.files().items() if path.is_file()}
    archive = host.archive("b")
    options = {"sha256": sha256(archive), "archive": archive}
    link = host.link
    if fault == "sha256":
        options["sha256"] = "0" * 64
    elif fault == "truncated":
        archive.write_bytes(archive.read_bytes()[:200])
        options["sha256"] = sha256(archive)
    elif fault == "other id":
        options = {"archive": host.archive("c"), "sha256": sha256(host.dist / "code-x-c.tar.gz")}
    else:
        link = host.root / ".served" / "current"
    with pytest.raises((ReleaseError, ArchiveError)):
        deploy(Store(str(host.root), str(link)), Wanted("b", **options), check=False)
    assert host.link.resolve().name == "a"
    assert {name: path.lstat().st_mtime_ns for name, path in host.files().items() if path.is_file()} == before


def test_a_failed_first_deployment_leaves_nothing(host):
    with pytest.raises(ReleaseError, match="has not the sha256"):
        host.deploy("a", digest="0" * 64)
    assert not host.root.parent.exists()


def test_a_folder_in_the_place_of_the_link_is_never_replaced(host):
    (host.link / "made by hand").mkdir(parents=True)
    with pytest.raises(ReleaseError, match="is not a link: move it away"):
        host.deploy("a", check=True)


@pytest.mark.parametrize("wrong", [{"root": "releases"}, {"link": "current"}])
def test_paths_must_be_absolute(wrong):
    with pytest.raises(ReleaseError, match="must be an absolute path"):
        Store(**{"root": "/r", "link": "/l", **wrong})


@pytest.mark.parametrize("release_id", ["", ".tmp", "../a", "a/b"])
def test_ids_that_could_leave_the_store_are_refused(host, release_id):
    with pytest.raises(ReleaseError, match="cannot be the id"):
        deploy(Store(str(host.root), str(host.link)), Wanted(release_id), check=True)


def edit(release):
    (release / "lib/app.py").write_text("VERSION = 'hacked'\n")


def delete(release):
    (release / "lib/app.py").unlink()


def delete_folder(release):
    shutil.rmtree(release / "lib")


def add(release):
    (release / "lib/new").mkdir()
    (release / "lib/new/site.pth").write_text("import os\n")


def make_executable(release):
    (release / "lib/app.py").chmod(0o755)


def retarget(release):
    (release / "app.py").unlink()
    (release / "app.py").symlink_to("run")


def swap_kinds(release):
    delete_folder(release)
    (release / "lib").write_text("")
    (release / "run").unlink()
    (release / "run").mkdir()
    (release / "run" / "x").write_text("")


def lose_manifest(release):
    (release / MANIFEST).unlink()


def edit_manifest(release):
    (release / MANIFEST).write_text("{}")


DRIFTS = {
    edit: {"lib/app.py: edited"},
    delete: {"lib/app.py: missing"},
    delete_folder: {"lib: missing", "lib/app.py: missing"},
    add: {"lib/new: added", "lib/new/site.pth: added"},
    make_executable: {"lib/app.py: edited"},
    retarget: {"app.py: edited"},
    swap_kinds: {"lib: edited", "lib/app.py: missing", "run: edited", "run/x: added"},
    lose_manifest: {f"{MANIFEST}: edited"},
    edit_manifest: {f"{MANIFEST}: edited"},
}


@pytest.mark.parametrize("harm", DRIFTS, ids=lambda harm: harm.__name__)
def test_drift_is_seen_told_in_check_mode_and_mended(host, harm):
    host.deploy("a")
    harm(host.root / "a")
    untouched = (host.root / "a").stat().st_ino
    for _ in range(2):
        seen = host.deploy("a", check=True, bring=False)
        assert seen["changed"] and seen["needs_archive"] and set(seen["drift"]) == DRIFTS[harm]
    assert host.deploy("a")["changed"]
    assert not host.deploy("a", bring=False, full=True)["changed"]
    assert (host.root / "a").stat().st_ino == untouched


def test_only_a_full_check_sees_an_edit_that_hides_its_time(host):
    host.deploy("a")
    app = host.root / "a/lib/app.py"
    status = app.stat()
    app.write_text("VERSION = 'b'\n")
    os.utime(app, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not host.deploy("a", bring=False)["changed"]
    assert host.deploy("a", bring=False, check=True, full=True)["drift"] == ["lib/app.py: edited"]
    host.deploy("a", full=True)
    assert app.read_text() == "VERSION = 'a'\n"


def test_long_drift_is_told_in_short(host):
    host.deploy("a")
    for number in range(80):
        (host.root / f"a/junk{number:02}").write_text("")
    drift = host.deploy("a", check=True, bring=False)["drift"]
    assert len(drift) == 51 and drift[-1] == "... and 30 more"


def test_rollback_needs_no_archive(host):
    host.deploy("a")
    assert host.deploy("b")["previous"] == "a"
    shutil.rmtree(host.dist)
    result = host.deploy("a", bring=False)
    assert (result["current"], result["previous"]) == ("a", "b") and result["changed"]
    assert (host.link / "app.py").read_text() == "VERSION = 'a'\n"
    assert not host.deploy("a", bring=False)["changed"]


def test_a_prepared_release_waits_beside_the_current_one(host):
    host.deploy("a")
    result = host.deploy("b", activate=False)
    assert result["changed"] and (result["current"], result["previous"]) == ("a", None)
    assert host.link.resolve().name == "a"
    assert not host.deploy("b", activate=False, bring=False)["changed"]
    result = host.deploy("b", bring=False)
    assert (result["current"], result["previous"]) == ("b", "a")


def test_going_back_goes_on_backward(host):
    for one in "abc":
        host.deploy(one)
    for current, previous in (("b", "a"), ("a", None)):
        result = host.deploy(current, bring=False, record=False, keep=9)
        assert (result["current"], result["previous"], result["pruned"]) == (current, previous, [])
    assert host.deploy("b", bring=False, record=False)["previous"] == "a"
    # What was left for another one, and what served last, is nearer than what was gone back from.
    assert host.deploy("d")["previous"] == "b"
    assert (host.root / ".served").read_text().split() == ["d", "b", "c", "a"]


def test_what_no_program_ever_ran_has_not_served(host, tmp_path):
    programs = tmp_path / "gpufleet.conf"
    options = {"in_use": (str(programs),)}
    host.deploy("a", **options)
    programs.write_text(f"directory={host.root}/a")
    host.deploy("b", **options)  # and put back at its first card
    result = host.deploy("c", **options)
    assert (result["previous"], result["pruned"]) == ("a", ["b"])
    programs.write_text("")  # as where all programs were taken off the host
    assert host.deploy("d", **options)["previous"] == "c"


def test_the_newest_that_served_are_kept(host):
    pruned = {one: host.deploy(one, keep=3)["pruned"] for one in "abcde"}
    assert pruned == {"a": [], "b": [], "c": [], "d": ["a"], "e": ["b"]}
    assert host.deploy("c", bring=False, keep=3)["previous"] == "e"
    assert host.deploy("c", bring=False, keep=1, check=True)["pruned"] == ["d"]
    assert Store(str(host.root), str(host.link)).ids() == ["c", "d", "e"]
    assert host.deploy("c", bring=False, keep=1)["pruned"] == ["d"]
    assert Store(str(host.root), str(host.link)).ids() == ["c", "e"]


def run_program(release):
    shutil.copy("/bin/sleep", release / "sleep")
    return subprocess.Popen([release / "sleep", "60"])


def run_inside(release):
    return subprocess.Popen(["/bin/sleep", "60"], cwd=release / "lib")


MAP = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file:
    held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("held", flush=True)
time.sleep(60)
"""


def map_file(release):
    process = subprocess.Popen([sys.executable, "-c", MAP, release / "run"], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    return process


@pytest.mark.parametrize("use", [run_program, run_inside, map_file], ids=lambda use: use.__name__)
def test_a_release_that_a_process_runs_from_is_not_removed(host, use):
    host.deploy("a")
    process = use(host.root / "a")
    try:
        for one in "bcd":
            assert host.deploy(one, keep=1)["pruned"] == ([] if one < "d" else ["b"])
        assert (host.root / "a").is_dir()
    finally:
        process.terminate()
        process.wait()
    assert host.deploy("d", keep=1, bring=False)["pruned"] == ["a"]


def test_a_release_that_a_file_names_is_not_removed(host, tmp_path):
    programs = tmp_path / "conf.d"
    programs.mkdir()
    (programs / "gpufleet.conf").write_text(f'directory={host.root}/a1\nenvironment=X="{host.root}/b.2/lib"\n')
    in_use = (str(programs / "gpufleet*.conf"), str(tmp_path / "nothing*"))
    for one in ("a", "a1", "b", "b.2", "c", "d"):
        host.deploy(one, keep=2, in_use=in_use)
    assert Store(str(host.root), str(host.link)).ids() == ["a1", "b.2", "d"]


def test_concurrent_deployments_wait_for_each_other(host):
    store = Store(str(host.root), str(host.link))
    archive = host.archive("a")
    code = (
        "import sys; from pathlib import Path; "
        "from ansible_collections.gpufleet.core.plugins.module_utils.release import *; "
        "deploy(Store(*sys.argv[1:3]), Wanted('a', Path(sys.argv[3]), sys.argv[4]), False)"
    )
    with store.changing() as scratch:
        command = [sys.executable, "-c", code, host.root, host.link, archive, sha256(archive)]
        process = subprocess.Popen(command, env={"PYTHONPATH": str(PROJECT / "collections")})
        time.sleep(0.5)
        assert process.poll() is None and list(scratch.iterdir()) == []
    assert process.wait(10) == 0
    assert store.current() == "a"


def test_who_waits_for_a_store_survives_that_its_folder_vanishes(host):
    inside = []

    def change_and_fail(_):
        with Store(str(host.root), str(host.link)).changing() as scratch:
            inside.append(scratch)
            assert scratch.is_dir() and len(inside) == 1
            inside.clear()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change_and_fail, range(400)))
    assert not inside


def test_through_ansible(host, tmp_path):
    """One playbook that goes through what the action plugin decides, with what happens to the files in between."""
    archive, other = host.archive("a"), host.archive("b")
    away, damaged = tmp_path / "away", host.root / "a" / "lib" / "app.py"
    release = {"id": "a", "root": str(host.root), "link": str(host.link)}
    brought = {**release, "archive": str(archive)}

    def step(name, task, look=False):
        return {
            "gpufleet.core.release": task,
            "register": name,
            "ignore_errors": True,
            "check_mode": look,
            "diff": look,
        }

    def shell(command):
        return {"ansible.builtin.command": command}

    tasks = [
        step("looked", brought, look=True),
        {"ansible.builtin.stat": {"path": str(host.root)}, "register": "untouched"},
        step("first", brought),
        shell(f"mv {archive} {away}"),
        step("second", brought),
        {"ansible.builtin.copy": {"content": "edited", "dest": str(damaged)}, "diff": False},
        step("found", brought, look=True),
        step("bare", release),
        step("missing", brought),
        shell(f"cp {other} {archive}"),
        step("wrong", brought),
    ]
    names = [task["register"] for task in tasks if "register" in task]
    told = {"content": "{{ {" + ", ".join(f"'{name}': {name}" for name in names) + "} | to_json }}"}
    tasks.append({"ansible.builtin.copy": {**told, "dest": str(tmp_path / "out")}, "diff": False})
    variables = {"ansible_python_interpreter": sys.executable}
    (tmp_path / "play.yml").write_text(
        yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "vars": variables, "tasks": tasks}])
    )
    settings = {
        "ANSIBLE_COLLECTIONS_PATH": str(PROJECT / "collections"),
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_NOCOLOR": "true",
    }
    command = [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", "-c", "local", "play.yml"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out").read_text())

    assert results["looked"]["changed"] and "needs_archive" not in results["looked"]
    assert not results["untouched"]["stat"]["exists"]
    assert "+lib/app.py" in done.stdout
    assert results["first"]["changed"] and results["first"]["current"] == "a"
    assert not results["second"]["changed"], "nothing is copied when nothing is missing: the archive is gone"
    assert results["found"]["changed"] and "-lib/app.py: edited" in done.stdout
    assert "is damaged there (lib/app.py: edited) and no archive was given" in results["bare"]["msg"]
    assert "are not on the controller: build them first" in results["missing"]["msg"]
    assert "has not the sha256" in results["wrong"]["msg"]
    assert host.link.resolve().name == "a"

"""Ids of releases: functions of content alone, the same for templates and tools."""

import json

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.core.plugins.filter.release import FilterModule
from ansible_collections.gpufleet.core.plugins.module_utils.release_ids import conda_id
from hypothesis import given
from hypothesis import strategies as st

FILTERS = FilterModule().filters()
conda_releases, code_releases = FILTERS["conda_releases"], FILTERS["code_releases"]

HASHES = st.text("0123456789abcdef", min_size=64, max_size=64)
NAMES = st.text("abcxyz", min_size=1, max_size=5)


def write_lock(folder, conda, wheels, note=""):
    """Write a lock folder: conda and wheels are name -> sha256; the note stands for all that does not count."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = [
        {"conda": f"https://channel.example/{note}/{name}-1-0.conda", "sha256": sha, "indexed_timestamp": note}
        for name, sha in conda.items()
    ]
    (folder / "conda.lock").write_text(json.dumps({"packages": packages}))
    lines = [f"{name}==1 --hash=sha256:{sha}\n" for name, sha in wheels.items()]
    (folder / "pip.lock").write_text("".join([f"# {note}\n", "\n", *lines]))


@given(conda=st.dictionaries(NAMES, HASHES, max_size=4), wheels=st.dictionaries(NAMES, HASHES, max_size=4))
def test_a_lock_with_the_same_packages_is_the_same_release(tmp_path_factory, conda, wheels):
    folder = tmp_path_factory.mktemp("lock")
    write_lock(folder / "one", conda, wheels)
    write_lock(folder / "two", dict(reversed(conda.items())), dict(reversed(wheels.items())), note="later")
    first = conda_id("tts", folder / "one", "/opt/conda")
    assert first == conda_id("tts", folder / "two", "/opt/conda")
    assert first != conda_id("asr", folder / "one", "/opt/conda")
    assert first != conda_id("tts", folder / "one", "/srv/conda")


@given(st.dictionaries(NAMES, HASHES, min_size=1), st.data())
def test_another_hash_is_another_release(tmp_path_factory, packages, data):
    folder = tmp_path_factory.mktemp("lock")
    changed = {**packages, data.draw(st.sampled_from(sorted(packages))): data.draw(HASHES)}
    for name, conda, wheels in [("conda", packages, {}), ("pip", {}, packages)]:
        write_lock(folder / name, conda, wheels)
        write_lock(folder / f"{name} changed", changed if conda else {}, changed if wheels else {})
        same = conda_id("x", folder / name, "/") == conda_id("x", folder / f"{name} changed", "/")
        assert same == (changed == packages)


def test_places_of_an_environment(tmp_path):
    write_lock(tmp_path / "envs/tts", {"python": "0" * 64}, {})
    release = conda_releases({"tts": {"lock": "envs/tts"}}, "/opt/conda", "tar.zst", project=str(tmp_path))["tts"]
    assert release == {
        "name": "tts",
        "id": release["id"],
        "root": "/opt/conda/releases/tts",
        "path": f"/opt/conda/releases/tts/{release['id']}",
        "link": "/opt/conda/envs/tts",
        "archive": f"{tmp_path}/dist/conda-tts-{release['id']}.tar.zst",
    }
    assert len(release["id"]) == 12


@pytest.mark.parametrize(
    ("conda_lock", "fault"),
    [(None, "conda.lock does not exist"), ("[", "holds no lock"), ("packages: 3", "holds no lock")],
)
def test_an_environment_without_a_lock_is_refused_with_the_remedy(tmp_path, conda_lock, fault):
    if conda_lock is not None:
        (tmp_path / "conda.lock").write_text(conda_lock)
        (tmp_path / "pip.lock").write_text("")
    with pytest.raises(AnsibleFilterError, match=f"{fault}.*make it with python -m tools.condaenv lock {tmp_path}"):
        conda_releases({"tts": {"lock": str(tmp_path)}}, "/opt/conda")


@pytest.fixture
def project(tmp_path):
    """A project with a guard and one service."""
    guard = tmp_path / "service/guard/slot_guard"
    guard.mkdir(parents=True)
    (guard / "asgi.py").write_text("app = None\n")
    source = tmp_path / "service/tts"
    (source / "tts").mkdir(parents=True)
    (source / "tts/app.py").write_text("app = None\n")
    return tmp_path


def version(project, **code):
    """Version that the filter gives to the project's service."""
    return code_releases({"tts": {"code": {"source": "service/tts", **code}}}, "/opt/gpufleet", str(project))["tts"][
        "id"
    ]


def test_places_of_a_services_code(project):
    release = code_releases({"tts": {"code": {"source": "service/tts"}}}, "/opt/gpufleet", str(project))["tts"]
    assert release == {
        "name": "tts",
        "id": release["id"],
        "root": "/opt/gpufleet/tts/releases",
        "path": f"/opt/gpufleet/tts/releases/{release['id']}",
        "link": "/opt/gpufleet/tts/current",
        "archive": f"{project}/dist/code-tts-{release['id']}.tar.gz",
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda project: (project / "service/tts/tts/app.py").write_text("app = 1\n"),
        lambda project: (project / "service/tts/tts/app.py").chmod(0o755),
        lambda project: (project / "service/tts/new.py").write_text(""),
        lambda project: (project / "service/tts/link").symlink_to("tts"),
        lambda project: (project / "service/tts/tts/app.py").rename(project / "service/tts/app.py"),
        lambda project: (project / "service/guard/slot_guard/asgi.py").write_text("app = 1\n"),
    ],
    ids=["content", "executable", "new file", "new link", "name", "guard"],
)
def test_content_makes_the_version(project, change):
    before = version(project)
    change(project)
    assert version(project) != before


def test_nothing_else_makes_the_version(project):
    before = version(project)
    (project / "service/tts/tts/app.py").touch()
    (project / "service/tts/tts/app.py").chmod(0o600)
    for name in ("__pycache__", ".git", ".pytest_cache"):
        (project / "service/tts" / name).mkdir()
        (project / "service/tts" / name / "x").write_text("x")
    assert version(project) == before


def test_a_missing_folder_is_refused(project):
    with pytest.raises(AnsibleFilterError, match=r"services.tts.code.source: .*/nowhere is not a folder"):
        version(project, source="nowhere")


def test_a_full_commit_needs_no_repository_at_hand(project):
    assert version(project, source="https://git.example/x.git", version="ab" * 20).startswith("abababababab-")


@pytest.mark.parametrize(
    ("code", "fault"),
    [({}, "needs a revision"), ({"version": "v1"}, "v1 is not in https://git.example/x.git as last fetched")],
)
def test_a_revision_that_is_not_known_is_refused(project, code, fault):
    with pytest.raises(AnsibleFilterError, match=fault):
        version(project, source="https://git.example/x.git", **code)

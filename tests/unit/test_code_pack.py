"""tools.pack: a service's files and the guard beside them, from a folder or a git repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.gpufleet.core.plugins.module_utils.archive import MANIFEST, unpack, walk
from ansible_collections.gpufleet.core.plugins.module_utils.release_ids import SourceError, code_release

from tools.pack import pack_code

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    """A project with a guard and one service."""
    folder = tmp_path / "project"
    for name, text in {"service/guard/slot_guard/asgi.py": "guard", "service/tts/tts/app.py": "app"}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    (folder / "service/tts/tts/__pycache__").mkdir()
    return folder


@pytest.fixture
def repository(tmp_path):
    """A git repository and a function that runs git in it."""
    folder = tmp_path / "repository"
    folder.mkdir()
    nobody = {f"GIT_{role}_{what}": "x@example" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments):
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(
            command, env={**os.environ, **nobody}, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "--quiet", "--initial-branch=main")
    (folder / "app.py").write_text("one")
    git("add", ".")
    git("commit", "--quiet", "--message=one")
    git("tag", "v1")
    return folder, git


def unpacked(packed, folder):
    """Files of a packed release: name -> text."""
    unpack(Path(packed["archive"]), folder)
    return {name: path.read_text() for name, path in walk(folder).items() if path.is_file() and name != MANIFEST}


def test_a_folder_is_packed_once_with_the_guard_beside_it(project, tmp_path):
    code = {"source": "service/tts"}
    packed = pack_code("tts", code, project)
    assert packed["changed"] and packed["archive"] == code_release("tts", code, "", str(project))["archive"]
    assert unpacked(packed, tmp_path / "release") == {"tts/app.py": "app", "slot_guard/asgi.py": "guard"}
    before = Path(packed["archive"]).read_bytes()
    assert not pack_code("tts", code, project)["changed"]
    Path(packed["archive"]).unlink()
    (project / "service/tts/tts/app.py").touch()
    assert pack_code("tts", code, project)["changed"]
    assert Path(packed["archive"]).read_bytes() == before


@pytest.mark.parametrize("clash", ["slot_guard/__init__.py", "slot_guard.py"])
def test_a_source_with_a_guard_of_its_own_is_refused(project, clash):
    (project / "service/tts" / clash).parent.mkdir(exist_ok=True)
    (project / "service/tts" / clash).write_text("")
    with pytest.raises(SourceError, match="has its own slot_guard"):
        pack_code("tts", {"source": "service/tts"}, project)
    assert not (project / "dist").exists()


def test_a_git_source_is_fetched_and_packed_at_its_revision(project, repository, tmp_path):
    folder, git = repository
    source = f"file://{folder}"
    first = pack_code("tts", {"source": source, "version": "v1"}, project)
    assert first["id"].startswith(git("rev-parse", "v1")[:12] + "-")
    assert unpacked(first, tmp_path / "v1") == {"app.py": "one", "slot_guard/asgi.py": "guard"}

    (folder / "app.py").write_text("two")
    git("commit", "--quiet", "--all", "--message=two")
    second = pack_code("tts", {"source": source, "version": "main"}, project)
    assert second["id"] == code_release("tts", {"source": source, "version": "main"}, "", str(project))["id"]
    assert unpacked(second, tmp_path / "main")["app.py"] == "two"

    commit = git("rev-parse", "v1")
    folder.rename(tmp_path / "away")  # an exact commit that is there is not fetched
    assert pack_code("tts", {"source": source, "version": commit}, project) == {**first, "changed": False}
    with pytest.raises(SourceError, match="git"):
        pack_code("tts", {"source": source, "version": "main"}, project)


def test_the_command_line_says_what_it_did_and_what_it_cannot(project):
    command = [sys.executable, "-m", "tools.pack", "--project", project, "tts"]
    done = subprocess.run([*command, "service/tts"], cwd=PROJECT, capture_output=True, text=True)
    assert json.loads(done.stdout)["changed"]
    done = subprocess.run([*command, "nowhere"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("pack: services.tts.code.source: ")

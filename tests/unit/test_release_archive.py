"""The archive of a release: same bytes for the same files, and nothing but those files on the host."""

import io
import json
import tarfile

import pytest
from ansible_collections.gpufleet.core.plugins.module_utils.archive import (
    EPOCH,
    MANIFEST,
    ArchiveError,
    Manifest,
    compare,
    is_packed,
    pack,
    read_sidecar,
    sha256,
    sidecar_path,
    unpack,
    walk,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.shell import provide

NAMES = st.text("ab.é文 -_", min_size=1, max_size=6).filter(lambda name: name not in (".", "..", MANIFEST))
FILES = st.tuples(st.binary(max_size=40), st.booleans())
TREES = st.recursive(
    st.dictionaries(NAMES, st.one_of(FILES, st.sampled_from(["target", "../../etc/passwd", "/etc"])), max_size=4),
    lambda inner: st.dictionaries(NAMES, st.one_of(FILES, inner), max_size=3),
    max_leaves=12,
)


def plant(folder, tree):
    """Write a tree: dicts are folders, pairs (content, executable) files, strings links."""
    folder.mkdir()
    for name, node in tree.items():
        path = folder / name
        if isinstance(node, dict):
            plant(path, node)
        elif isinstance(node, str):
            path.symlink_to(node)
        else:
            path.write_bytes(node[0])
            path.chmod(0o755 if node[1] else 0o600)


def unlike(tree):
    """The same tree, told the other way round, so that it is written in another order."""
    return {name: unlike(node) if isinstance(node, dict) else node for name, node in reversed(tree.items())}


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_any_tree_arrives_whole_and_its_archive_depends_on_nothing_else(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("tree")
    plant(folder / "one", tree)
    plant(folder / "two", unlike(tree))
    first = pack(folder / "one.tar.gz", "x", "1", walk(folder / "one"))
    assert pack(folder / "two.tar.gz", "x", "1", walk(folder / "two")) == first == sha256(folder / "one.tar.gz")
    manifest = unpack(folder / "one.tar.gz", folder / "release")
    assert compare(folder / "release", manifest, full=True) == {}
    assert walk(folder / "one").keys() == walk(folder / "release").keys() - {MANIFEST}


def test_zstd_archives_hold_the_same(tmp_path):
    provide({"zstd": "zstd"})
    plant(tmp_path / "tree", {"run": (b"#!/bin/sh\n", True), "lib": {"a": (b"a" * 100_000, False)}})
    digest = pack(tmp_path / "x-1.tar.zst", "x", "1", walk(tmp_path / "tree"))
    assert pack(tmp_path / "x-1.tar.zst", "x", "1", walk(tmp_path / "tree")) == digest
    manifest = unpack(tmp_path / "x-1.tar.zst", tmp_path / "release")
    assert compare(tmp_path / "release", manifest, full=True) == {}
    (tmp_path / "x-1.tar.zst").write_bytes((tmp_path / "x-1.tar.zst").read_bytes()[:-9])
    with pytest.raises(ArchiveError, match="cannot be unpacked"):
        unpack(tmp_path / "x-1.tar.zst", tmp_path / "again")


def test_without_zstd_the_message_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArchiveError, match="install the package zstd"):
        pack(tmp_path / "x-1.tar.zst", "x", "1", {})
    assert list(tmp_path.iterdir()) == []


def test_the_sidecar_tells_the_contents_and_whether_the_archive_is_whole(tmp_path):
    plant(tmp_path / "tree", {"app.py": (b"x", False), "link": "app.py"})
    archive = tmp_path / "code-x-1.2.tar.gz"
    assert not is_packed(archive)
    pack(archive, "x", "1.2", walk(tmp_path / "tree"))
    assert sidecar_path(archive).name == "code-x-1.2.json"
    assert read_sidecar(archive)["contents"] == {"app.py": "2d711642b726", "link": "-> app.py"}
    assert is_packed(archive)
    archive.write_bytes(archive.read_bytes() + b"\0")
    assert not is_packed(archive)


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../b", "a//b", "", "./a"])
def test_a_manifest_cannot_name_a_path_outside_the_release(path):
    text = json.dumps({"name": "x", "id": "1", "contents": {}, "files": {path: ["file", 0, False, ""]}})
    with pytest.raises(ArchiveError, match="not a path inside"):
        Manifest.parse(text.encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"name":"x","id":"1","contents":{},"files":{"a":[1,2,3,4,5]}}'])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(ArchiveError, match="cannot be read"):
        Manifest.parse(text)


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    ("files", "members", "fault"),
    [
        ({}, ["a"], "does not list"),
        ({"a": ["file", 0, False, EMPTY]}, ["a", "a"], "does not list"),
        ({"a": ["file", 0, False, EMPTY], "b": ["dir"]}, ["a"], "lacks b"),
        ({"a": ["file", 0, False, "0" * 64]}, ["a"], "the hash differs"),
        ({"a": ["link", 0, False, "/tmp"], "a/b": ["file", 0, False, EMPTY]}, ["a", "a/b"], "cannot be unpacked"),
        ({"a": ["file", 1 << 60, False, EMPTY]}, ["a"], "MiB free"),
    ],
)
def test_an_archive_that_is_not_as_its_manifest_says_is_refused(tmp_path, files, members, fault):
    text = json.dumps({"name": "x", "id": "1", "contents": {}, "files": files}).encode()
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for name, content in [(MANIFEST, text), *((name, b"") for name in members)]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if files.get(name, [""])[0] == "link":
                member.type, member.linkname = tarfile.SYMTYPE, files[name][3]
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ArchiveError, match=fault):
        unpack(tmp_path / "x.tar.gz", tmp_path / "release")


def test_times_and_modes_on_the_host_are_fixed(tmp_path):
    plant(tmp_path / "tree", {"bin": {"run": (b"", True)}, "secret": (b"", False)})
    pack(tmp_path / "x.tar.gz", "x", "1", walk(tmp_path / "tree"))
    unpack(tmp_path / "x.tar.gz", tmp_path / "release")
    status = {name: path.stat() for name, path in walk(tmp_path / "release").items()}
    assert {name: oct(one.st_mode & 0o777) for name, one in status.items()} == {
        MANIFEST: "0o644",
        "bin": "0o755",
        "bin/run": "0o755",
        "secret": "0o644",
    }
    assert {one.st_mtime for name, one in status.items() if name != "bin"} == {EPOCH}

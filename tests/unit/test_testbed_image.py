"""The recipe's inputs; the image that comes of it is what every molecule scenario runs on."""

import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from testbed import image
from testbed.shell import CommandFailed, run, tar


@pytest.fixture
def apt_says(monkeypatch: pytest.MonkeyPatch):
    def say(text: str) -> None:
        monkeypatch.setattr(image, "run", lambda *command: text)

    return say


def test_only_the_settings_that_reach_a_mirror_travel(apt_says) -> None:
    apt_says(
        'APT::Architecture "amd64";\nAcquire::http::Proxy "http://proxy:3128";\nAcquire::https::Proxy "";\n'
        'Acquire::http::Proxy::mirror "DIRECT";\nAcquire::Check-Date "false";\nDir::Cache "var/cache/apt";\n'
    )
    assert image.apt_options() == (
        'Acquire::Languages "none"',
        'Acquire::http::Proxy "http://proxy:3128"',
        'Acquire::http::Proxy::mirror "DIRECT"',
        'Acquire::Check-Date "false"',
    )


def test_authorities_and_proxies_of_the_machine_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = tmp_path / "company.crt"
    authority.write_text("certificate")
    monkeypatch.setattr(image, "AUTHORITIES", tmp_path)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    with tarfile.open(fileobj=BytesIO(image.overlay())) as archive:
        assert archive.extractfile(str(authority.relative_to("/"))).read() == b"certificate"
        assert b"https_proxy=http://proxy:3128\n" in archive.extractfile("etc/environment").read()


def test_a_recipe_has_one_tag_and_another_recipe_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "apt_options", lambda: ())
    first = image.tag()
    assert first == image.tag()
    monkeypatch.setattr(image, "PACKAGES", (*image.PACKAGES, "vim"))
    assert first != image.tag()


def test_an_archive_depends_on_its_files_only() -> None:
    archive = tar({"etc/a": b"1", "usr/bin/b": b"2"}, {"usr/bin/b": 0o755})
    assert archive == tar({"etc/a": b"1", "usr/bin/b": b"2"}, {"usr/bin/b": 0o755})
    with tarfile.open(fileobj=BytesIO(archive)) as members:
        assert [(member.name, member.mode, member.uid) for member in members] == [
            ("etc/a", 0o644, 0),
            ("usr/bin/b", 0o755, 0),
        ]


def test_a_failed_command_says_what_it_said() -> None:
    with pytest.raises(CommandFailed, match=r"ended with status 3:\nout of paper"):
        run("sh", "-c", "echo out of paper >&2; exit 3")
    with pytest.raises(CommandFailed, match="No such file"):
        run("/nonexistent")
    with pytest.raises(CommandFailed, match="timed out"):
        run("sleep", "5", seconds=0.1)

"""The module that has systemd units run with their files, against a simulated systemctl."""

import contextlib
import json
from unittest.mock import Mock

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpufleet.core.plugins.modules import units

SYSTEMCTL = """#!/bin/sh
# systemctl, simulated: a unit is known where the folder has NAME.known, runs where NAME.active is there, and comes up
# unless its settings say "broken".
cd {folder}
for name; do :; done
broken() {{ grep -qs broken "$name.settings"; }}
case "$*" in
show*)
    test -e "$name.known" && echo LoadState=loaded || echo LoadState=not-found
    test -e "$name.active" && echo ActiveState=active || echo ActiveState=inactive
    test -e "$name.enabled" && echo UnitFileState=enabled || echo UnitFileState=disabled
    exit ;;
daemon-reload) ;;
enable*) test -e "$name.known" && touch "$name.enabled" ;;
restart*|reload*) if broken; then rm -f "$name.active"; else touch "$name.active"; fi ;;
stop*) rm -f "$name.active" ;;
disable\\ --now*) test -e "$name.known" && rm -f "$name.active" "$name.enabled" ;;
disable*) rm -f "$name.enabled" ;;
*) echo "systemctl, simulated: $*?" >&2; exit 1 ;;
esac || exit
case "$*" in daemon-reload) ;; *) echo "$1 $name" >>log ;; esac
"""
NAME = "watcher.service"


class Host:
    """The module on a host, whose files and units are in a folder."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        for name, text in (
            ("systemctl", SYSTEMCTL.format(folder=folder)),
            ("journalctl", "#!/bin/sh\necho last words\n"),
        ):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.settings, self.drop_in = folder / f"{NAME}.settings", folder / "systemd/watcher.service.d/gpufleet.conf"
        self.watched, self.made = folder / "targets", folder / "made"
        (folder / f"{NAME}.known").touch()

    def apply(self, settings="a", drop_in="d", watched="w", plan=False, run=True, **given):
        """Call the module; the result has ``failed`` where it failed."""
        unit = {"name": NAME, "files": {str(self.settings): settings, str(self.drop_in): drop_in}}
        unit |= {"watched": {str(self.watched): watched}, "makes": [str(self.made)], **given}
        unit |= {} if run is None else {"run": run}
        self.capsys.readouterr()
        arguments = {"units": [unit], "_ansible_check_mode": plan, "_ansible_diff": True}
        with patch_module_args(arguments), contextlib.suppress(SystemExit):
            units.main()
        return json.loads(self.capsys.readouterr().out)

    def done(self):
        """What systemctl was told since the last look."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.removesuffix(f" {NAME}") for line in lines]

    def found(self):
        """Texts of the files there are, by name, and what the unit does."""
        files = {path.name: path.read_text() for path in (self.settings, self.drop_in, self.watched) if path.exists()}
        return files, {word for word in ("active", "enabled") if (self.folder / f"{NAME}.{word}").exists()}


WHOLE = {"watcher.service.settings": "a", "gpufleet.conf": "d", "targets": "w"}
UP = {"active", "enabled"}


@pytest.fixture
def host(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(units, "SYSTEMD", tmp_path / "systemd")
    monkeypatch.setattr(units, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(units, "MARKS", tmp_path / "marks")
    return Host(tmp_path, capsys)


def test_a_unit_comes_up_with_its_files_and_a_second_run_changes_nothing(host):
    planned = host.apply(plan=True)
    assert (planned["changed"], planned["touched"], len(planned["diff"])) == (True, [NAME], 3)
    assert (host.found(), host.done()) == (({}, set()), [])
    assert host.apply()["changed"]
    assert (host.found(), host.done()) == ((WHOLE, UP), ["enable", "restart"])
    for plan in (True, False):
        assert not host.apply(plan=plan)["changed"]
    assert host.done() == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": "b"}, ["enable", "restart"]),
        ({"settings": "b", "reload": True}, ["enable", "reload"]),
        ({"drop_in": "e", "reload": True}, ["enable", "restart"]),
        ({"watched": "x"}, ["enable"]),
    ],
)
def test_a_change_is_taken_over_as_the_program_can(host, changes, told):
    host.apply()
    host.done()
    assert host.apply(**changes)["changed"]
    assert host.done() == told
    assert not host.apply(**changes)["changed"]


@pytest.mark.parametrize("lost", ["active", "enabled"])
def test_what_was_stopped_or_disabled_runs_again(host, lost):
    host.apply()
    (host.folder / f"{NAME}.{lost}").unlink()
    assert host.apply(plan=True)["changed"]
    assert host.apply()["changed"]
    assert host.found() == (WHOLE, UP)


def test_nothing_is_left_of_a_unit_that_is_not_to_run(host):
    host.apply()
    host.made.touch()
    host.done()
    assert host.apply(run=False, plan=True)["changed"]
    assert host.found() == (WHOLE, UP)
    assert host.apply(run=False)["changed"]
    assert (host.found(), host.made.exists(), host.done()) == (({}, set()), False, ["disable"])
    assert not host.apply(run=False)["changed"]


def test_what_is_left_of_a_program_that_was_removed_goes_too(host):
    host.apply()
    (host.folder / f"{NAME}.known").unlink()
    assert host.apply(run=False)["changed"]
    assert host.found()[0] == {}


def test_a_unit_of_somebody_else_is_left_alone(host):
    (host.folder / f"{NAME}.active").touch()
    (host.folder / f"{NAME}.enabled").touch()
    assert not host.apply(run=False)["changed"]
    assert host.found() == ({}, UP)


def test_an_empty_text_is_no_file(host):
    host.apply()
    assert host.apply(watched="")["changed"]
    assert host.found()[0] == {name: text for name, text in WHOLE.items() if name != "targets"}


def test_what_does_not_come_up_is_as_it_was_before(host):
    refused = host.apply(settings="broken")
    assert refused["failed"] and "did not come up" in refused["msg"] and "last words" in refused["msg"]
    assert host.found() == ({}, set())
    host.apply()
    assert host.apply(settings="broken", watched="x")["failed"]
    assert host.found() == (WHOLE, UP)
    assert not host.apply()["changed"]


def test_what_cannot_be_put_back_is_not_called_as_before(host):
    host.apply()
    host.settings.write_text("broken")
    refused = host.apply(settings="broken too")["msg"]
    assert refused.endswith("Its files are as they were before, but it is inactive and enabled.")
    assert host.apply(settings="broken", plan=True)["changed"]
    assert host.apply()["changed"]
    assert host.found() == (WHOLE, UP)
    assert not host.apply()["changed"]


def test_a_run_that_was_cut_off_is_finished_by_the_next(host, monkeypatch):
    host.apply()
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        cut.setattr(units.Unit, "take_over", Mock(side_effect=KeyboardInterrupt))
        host.apply(settings="b")
    host.done()
    assert host.apply(settings="b", check=["false"])["failed"]
    assert host.apply(settings="b", plan=True)["changed"]
    assert host.done() == []
    assert host.apply(settings="b")["changed"]
    assert host.done() == ["enable", "restart"]
    assert not host.apply(settings="b")["changed"]


def test_what_its_check_refuses_is_never_read(host):
    judge = ["grep", "--quiet", "a", str(host.settings)]
    host.apply(check=judge)
    host.done()
    assert host.apply(check=judge, settings="b", watched="x")["failed"]
    assert host.found() == (WHOLE, UP)
    assert host.done() == []


def test_a_unit_without_a_wish_gets_its_files_where_it_is_installed(host):
    (host.folder / f"{NAME}.active").touch()
    assert host.apply(run=None)["changed"]
    assert (host.found(), host.done()) == ((WHOLE, {"active"}), ["restart"])
    (host.folder / f"{NAME}.active").unlink()
    assert host.apply(run=None, settings="b")["changed"]
    assert (host.found()[1], host.done()) == (set(), [])
    assert host.apply(run=None, settings="", drop_in="", watched="")["changed"]
    assert host.found() == ({}, set())
    (host.folder / f"{NAME}.known").unlink()
    assert not host.apply(run=None)["changed"]
    assert host.found() == ({}, set())

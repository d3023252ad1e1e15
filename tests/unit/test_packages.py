"""Which packages apt is asked for, by what dpkg says."""

import shlex
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.gpufleet.core.plugins.action.packages import ActionModule, missing, query


def test_only_what_dpkg_calls_installed_is_there() -> None:
    listing = "supervisor installed\nnginx config-files\nlibsndfile1 installed\nespeak-ng half-configured\n"
    assert missing(["supervisor", "libsndfile1"], listing) == []
    assert missing(["supervisor", "nginx", "espeak-ng", "sox"], listing) == ["nginx", "espeak-ng", "sox"]
    assert missing(["supervisor"], "") == ["supervisor"]


def test_apt_judges_what_is_no_plain_name() -> None:
    listing = "supervisor installed\n"
    assert missing(["supervisor=4.2.5-1", "super*"], listing) == ["supervisor=4.2.5-1", "super*"]


def test_names_are_no_options_and_no_shell_code() -> None:
    words = shlex.split(query(["--admindir=/tmp", "a; reboot"]))
    assert words[-3:] == ["--", "--admindir=/tmp", "a; reboot"]


class Action(ActionModule):
    """The plugin on a host of which dpkg tells a listing."""

    def __init__(self, listing: str, check: bool) -> None:
        self._task = SimpleNamespace(args={"name": ["nginx", "supervisor"]}, check_mode=check)
        self._listing = listing

    def run(self) -> dict[str, Any]:
        return super().run()

    def _low_level_execute_command(self, *_: object) -> dict[str, str]:
        return {"stdout": self._listing}

    def _execute_module(self, *_: object, module_args: dict[str, Any], **__: object) -> dict[str, Any]:
        return {"asked": module_args["name"]}


@pytest.fixture(autouse=True)
def _no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ansible.plugins.action.ActionBase.run", lambda *_: {})


def test_apt_is_asked_where_something_is_missing() -> None:
    both = "nginx installed\nsupervisor installed\n"
    assert Action(both, check=False).run() == {"changed": False}
    assert Action("nginx installed\n", check=False).run() == {"asked": ["nginx", "supervisor"]}
    assert Action("python3-apt installed\n", check=True).run() == {"asked": ["nginx", "supervisor"]}


def test_a_check_needs_no_python_apt_on_a_bare_host() -> None:
    assert Action("nginx installed\n", check=True).run() == {
        "changed": True,
        "msg": "apt would be asked for supervisor",
    }

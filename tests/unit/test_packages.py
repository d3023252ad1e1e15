"""Which packages apt is asked for, by what dpkg says."""

import shlex

from ansible_collections.gpufleet.core.plugins.action.packages import missing, query


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

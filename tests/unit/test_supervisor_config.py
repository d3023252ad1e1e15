# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Environments and program files against Supervisor's own parser."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.core.plugins.filter.supervisor import FilterModule
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import (
    compare,
    describe,
    parse_environment,
    parse_programs,
    supervisor_environment,
    unsupported_environment,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from supervisor.options import ServerOptions, UnhosedConfigParser

PREFIX = "gpufleet-"
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
#: Plain text, text made of what parsers trip over, and any Unicode.
VALUES = st.one_of(
    st.text(string.ascii_letters + string.digits + "/.-_ ", max_size=30),
    st.text(" \t\u3000;#%'\"=,\\()s[]{}$&:\n\rhere", max_size=12),
    st.text(max_size=30),
)


def as_supervisor_reads(path: Path, value: str) -> dict[str, str]:
    """Parse ``environment = value`` the way supervisord does with a file of conf.d."""
    path.write_text(f"[program:gpufleet-x]\ncommand = /bin/true\nenvironment =\n    {value}\n", encoding="utf-8")
    parser = UnhosedConfigParser()
    parser.read(str(path))
    parser.expand_here("/etc/supervisor/conf.d")
    (program,) = ServerOptions().processes_from_section(parser, "program:gpufleet-x", "gpufleet-x")
    return program.environment


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("supervisor") / "gpufleet.conf"


@settings(max_examples=400)
@given(environment=st.dictionaries(NAMES, VALUES, min_size=1, max_size=4))
def test_every_supported_environment_arrives_as_it_was_written(file: Path, environment: dict[str, str]) -> None:
    assume(not any(unsupported_environment(value) for value in environment.values()))
    written = supervisor_environment(environment)
    assert as_supervisor_reads(file, written) == environment
    assert parse_environment(written) == environment


@settings(max_examples=400)
@given(before=VALUES, poison=st.sampled_from(["\n", "\r", " ;", "\u3000#", "%(here)s", "'\""]), after=VALUES)
def test_every_refused_value_would_really_have_been_broken(file: Path, before: str, poison: str, after: str) -> None:
    """Nothing is refused out of caution: neither way of quoting carries a refused value."""
    value = before + poison + after
    assert unsupported_environment(value)
    for quote in "'\"":
        escaped = value.replace("%", "%%")
        try:
            arrived = as_supervisor_reads(file, f"NAME={quote}{escaped}{quote}")
        except Exception:  # whatever the parser makes of it
            continue
        assert arrived != {"NAME": value}


@pytest.mark.parametrize(
    "value",
    [
        "100%",
        "%(ENV_HOME)s",
        "a,b=c",
        "it's",
        'say "hi"!',
        "C:\\models\\x",
        "你好,世界",
        "#1;2",
        "",
        " padded ",
        "a\tb",
    ],
)
def test_values_that_look_dangerous_are_carried(file: Path, value: str) -> None:
    assert unsupported_environment(value) is None
    assert as_supervisor_reads(file, supervisor_environment({"NAME": value})) == {"NAME": value}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("one\ntwo", "it spans lines"),
        ("one\rtwo", "it spans lines"),
        ("a\0b", "it contains a NUL character"),
        ("\ud800", "it is not valid Unicode"),
        ("'quoted'", "it begins or ends with a quote, which Supervisor strips"),
        ("""it's "so" it is""", "it contains both kinds of quotes, and Supervisor knows no escape for them"),
        ("a ;b", "it contains ; or # after a space, which Supervisor takes for a comment"),
        ("a\u3000#b", "it contains ; or # after a space, which Supervisor takes for a comment"),
        ("%(here)s", "it contains %(here)s, which Supervisor replaces"),
    ],
)
def test_refusals_give_the_reason(value: str, reason: str) -> None:
    assert unsupported_environment(value) == reason


def test_a_refusal_names_the_variable_and_the_remedy_but_not_the_value() -> None:
    with pytest.raises(ValueError, match=r"^environment\.TOKEN: it spans lines\. Pass it in a file") as refusal:
        supervisor_environment({"TOKEN": "very\nsecret"})
    assert "secret" not in str(refusal.value)


def test_the_filter_takes_numbers_and_refuses_bad_names() -> None:
    environment = FilterModule().filters()["supervisor_environment"]
    assert environment({"B": 1, "A": 0.5}) == "A='0.5',\n    B='1'"
    with pytest.raises(AnsibleFilterError, match=r"environment\.MY-NAME: not the name"):
        environment({"MY-NAME": "x"})


ONE = "# ours\n\n[program:gpufleet-a-0]\ncommand = /bin/sleep 1\nenvironment = HOME='/x',\n    TOKEN='hunter2'\n\n"
TWO = "[program:gpufleet-b-0]\ncommand = /bin/sleep 2\n"


def test_a_file_is_taken_apart_and_put_together() -> None:
    parsed = parse_programs(ONE + TWO, PREFIX)
    assert parsed.text == ONE + TWO
    assert parsed.header == "# ours\n\n"
    assert list(parsed.programs) == ["gpufleet-a-0", "gpufleet-b-0"]
    assert parsed.programs["gpufleet-b-0"].options == {"command": "/bin/sleep 2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO + TWO, "section 'program:gpufleet-b-0' already exists"),
        (TWO + "command = /bin/true\n", "option 'command' in section 'program:gpufleet-b-0' already exists"),
        ("[program:other]\ncommand = x\n", r"section \[program:other\] is not a \[program:gpufleet-…\]"),
        ("[group:gpufleet-a]\nprograms = x\n", r"section \[group:gpufleet-a\] is not a"),
        ("[DEFAULT]\nuser = root\n", r"section \[DEFAULT\] is not a"),
        ("[program:gpufleet-a]\nuser = x\n", "has no command"),
        ("command = x\n", "no section headers"),
        (" [program:gpufleet-a]\ncommand = x\n", "does not begin in the first column"),
        (TWO + "environment = A\n", "not a list of NAME='value' pairs"),
    ],
)
def test_what_is_no_file_of_our_programs_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_programs(text, PREFIX)


def test_changes_ignore_comments_and_white_space() -> None:
    before = parse_programs(ONE + TWO, PREFIX)
    after = parse_programs(
        "; other header\n" + TWO.replace(" = ", "=") + "# note\n\n[program:gpufleet-c]\ncommand=x", PREFIX
    )
    changes = compare(before, after)
    assert (changes.added, changes.changed, changes.removed) == (["gpufleet-c"], [], ["gpufleet-a-0"])
    assert compare(after, parse_programs(TWO.replace("2", "3"), PREFIX)).changed == ["gpufleet-b-0"]


def test_put_back_undoes_the_named_programs_only() -> None:
    before = parse_programs(ONE + TWO, PREFIX)
    new_c = "[program:gpufleet-c-0]\ncommand = /bin/sleep 3\n"
    after = parse_programs((ONE + TWO).replace("sleep", "cat") + new_c, PREFIX)
    assert after.put_back(["gpufleet-a-0", "gpufleet-c-0"], before).text == ONE + TWO.replace("sleep", "cat")
    assert before.put_back(["gpufleet-a-0"], before).text == before.text


def test_a_diff_shows_that_a_secret_changed_and_not_the_secret() -> None:
    before = describe(parse_programs(ONE, PREFIX).programs, b"salt")
    after = describe(parse_programs(ONE.replace("hunter2", "hunter3"), PREFIX).programs, b"salt")
    assert "hunter" not in before + after
    assert "environment HOME = /x\n" in before
    changed = set(before.splitlines()) ^ set(after.splitlines())
    assert len(changed) == 2
    assert all(line.startswith("environment TOKEN = (hidden, ") for line in changed)
    assert describe(parse_programs(ONE, PREFIX).programs, b"another salt") != before

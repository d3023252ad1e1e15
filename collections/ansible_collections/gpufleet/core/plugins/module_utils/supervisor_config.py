# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Supervisor's program files as data: environments that survive its parser, sections to compare, diffs to show.

Pure text in, pure data out: nothing here touches a host. Facts about Supervisor were read in its options.py and
datatypes.py, versions 4.2.5 and 4.3.0, which parse alike.
"""

from __future__ import annotations

import configparser
import hashlib
import hmac
import io
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: Variables whose values a diff may show: gpufleet sets them itself. Any other may be a password.
PUBLIC_VARIABLES = re.compile(r"^(?:CUDA_\w+|HOME|PYTHONUNBUFFERED|SLOT_GUARD_\w+)$")

_VARIABLE_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_SECTION = re.compile(r"^\[(?P<name>[^\]]*)\]")
_PROGRAM = "program:"
#: UnhosedConfigParser's: text after these is dropped where white space precedes them, quoted or not.
_COMMENTS = (";", "#")
_BIND = re.compile(r"--bind\s+\S*:(\d+)(?!\S)")
#: Characters besides letters, digits and _ that dict_of_key_value_pairs takes as part of a word.
_WORD_CHARACTERS = "/.+-():"


def unsupported_environment(value: str) -> str | None:
    """Tell why Supervisor cannot hand ``value`` to a program, or None if it can."""
    if re.search(r"[\r\n]", value):
        return "it spans lines"
    if "\0" in value:
        return "it contains a NUL character"
    if re.search(r"[\ud800-\udfff]", value):
        return "it is not valid Unicode"
    if value.startswith(("'", '"')) or value.endswith(("'", '"')):
        return "it begins or ends with a quote, which Supervisor strips"
    if "'" in value and '"' in value:
        return "it contains both kinds of quotes, and Supervisor knows no escape for them"
    if any(value[at - 1].isspace() for at, character in enumerate(value) if at and character in _COMMENTS):
        return "it contains ; or # after a space, which Supervisor takes for a comment"
    if "%(here)s" in value:
        return "it contains %(here)s, which Supervisor replaces"
    return None


def supervisor_environment(environment: Mapping[str, str]) -> str:
    """Write an environment as the value of a program's ``environment =``, one variable per line, sorted by name.

    :raises ValueError: a name or value that Supervisor cannot carry; names the variable, never the value.
    """
    words = []
    for name, value in sorted(environment.items()):
        if not _VARIABLE_NAME.match(name):
            raise ValueError(f"environment.{name}: not the name of an environment variable. Use letters, digits and _.")
        reason = unsupported_environment(value)
        if reason:
            raise ValueError(f"environment.{name}: {reason}. Pass it in a file and name that file here.")
        # Single quotes first: Supervisor 4.4 reads backslashes inside double ones as escapes.
        quote = '"' if "'" in value else "'"
        words.append(f"{name}={quote}{value}{quote}".replace("%", "%%"))
    return ",\n    ".join(words)


def parse_environment(text: str) -> dict[str, str]:
    """Read a program's ``environment =`` as Supervisor does: the inverse of :func:`supervisor_environment`."""
    lexer = shlex.shlex(text)
    lexer.wordchars += _WORD_CHARACTERS
    words = list(lexer)
    pairs = [words[at : at + 3] for at in range(0, len(words), 4)]
    if any(len(pair) != 3 or pair[1] != "=" for pair in pairs):
        raise ValueError("not a list of NAME='value' pairs")
    return {name: value.strip("'\"").replace("%%", "%") for name, _, value in pairs}


@dataclass(frozen=True)
class Program:
    """One ``[program:…]`` section: its text as written and its options as parsed."""

    text: str
    options: Mapping[str, str]

    def seconds(self, option: str, default: int) -> int:
        """Return an option that holds seconds, or Supervisor's ``default`` where it is not given."""
        return int(self.options.get(option, default))

    @property
    def port(self) -> int | None:
        """The TCP port that Gunicorn is told to listen at, if the command says so."""
        bind = _BIND.search(self.options["command"])
        return int(bind[1]) if bind else None

    @property
    def environment(self) -> dict[str, str]:
        """The environment that the section adds."""
        return parse_environment(self.options.get("environment", ""))


@dataclass(frozen=True)
class ProgramFile:
    """A file of programs: what stands before the first section, then the programs by name in file order."""

    header: str
    programs: Mapping[str, Program]

    @property
    def text(self) -> str:
        """The whole file."""
        return self.header + "".join(program.text for program in self.programs.values())

    def put_back(self, names: Iterable[str], previous: ProgramFile) -> ProgramFile:
        """Return this file with ``names`` as ``previous`` had them: its section, or none where it had none."""
        undone = set(names)
        programs = {
            name: (previous if name in undone else self).programs[name]
            for name in {**self.programs, **previous.programs}
            if name in (previous if name in undone else self).programs
        }
        return ProgramFile(self.header, programs)


@dataclass(frozen=True)
class Changes:
    """Names of programs, sorted, by what happens to them between two files."""

    added: list[str]
    changed: list[str]
    removed: list[str]

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset((*self.added, *self.changed, *self.removed))

    def with_restarts(self, names: Iterable[str]) -> Changes:
        """Return these changes and ``names``, which are replaced like what changed."""
        restarted = set(names).difference(self.added, self.removed)
        return Changes(self.added, sorted({*self.changed, *restarted}), self.removed)


def parse_programs(text: str, prefix: str) -> ProgramFile:
    """Take a file of programs apart.

    :param text: the file.
    :param prefix: what the name of every program must begin with.
    :raises ValueError: it is no such file: a syntax error, a section twice, one that is no program of ours.
    """
    parser = configparser.RawConfigParser(inline_comment_prefixes=_COMMENTS, default_section="")
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise ValueError(" ".join(str(error).split())) from error
    blocks: list[tuple[str, list[str]]] = [("", [])]
    for line in io.StringIO(text):
        section = _SECTION.match(line)
        if section:
            blocks.append((section["name"], []))
        blocks[-1][1].append(line)
    if [section_name for section_name, _ in blocks[1:]] != parser.sections():
        raise ValueError("a section does not begin in the first column of its line")
    programs = {}
    for section_name, lines in blocks[1:]:
        name = section_name[len(_PROGRAM) :]
        if section_name != _PROGRAM + name or not name.startswith(prefix):
            raise ValueError(f"section [{section_name}] is not a [{_PROGRAM}{prefix}…]")
        programs[name] = Program("".join(lines), dict(parser.items(section_name)))
        if "command" not in programs[name].options:
            raise ValueError(f"section [{section_name}] has no command")
        parse_environment(programs[name].options.get("environment", ""))
    return ProgramFile("".join(blocks[0][1]), programs)


def compare(before: ProgramFile, after: ProgramFile) -> Changes:
    """Tell what ``after`` adds, changes and removes. Comments and white space do not count."""
    return Changes(
        added=sorted(set(after.programs) - set(before.programs)),
        changed=sorted(
            name
            for name in set(before.programs) & set(after.programs)
            if before.programs[name].options != after.programs[name].options
        ),
        removed=sorted(set(before.programs) - set(after.programs)),
    )


def describe(programs: Mapping[str, Program], salt: bytes) -> str:
    """Write programs for a diff: an option or variable a line, values that may be secret replaced by a fingerprint.

    Equal secrets have equal fingerprints under one ``salt``, so that a diff shows that one changed. With a salt that
    nobody else knows, a fingerprint does not help to guess its secret.
    """
    lines = []
    for name, program in programs.items():
        lines.append(f"[{_PROGRAM}{name}]")
        for option, value in program.options.items():
            if option == "environment":
                variables = parse_environment(value).items()
                lines += [f"environment {variable} = {_shown(variable, text, salt)}" for variable, text in variables]
            else:
                lines.append(f"{option} = {' '.join(value.split())}")
    return "".join(f"{line}\n" for line in lines)


def _shown(variable: str, value: str, salt: bytes) -> str:
    if PUBLIC_VARIABLES.match(variable):
        return value
    return f"(hidden, {hmac.new(salt, value.encode(), hashlib.sha256).hexdigest()[:8]})"

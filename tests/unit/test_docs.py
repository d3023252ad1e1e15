"""Documents: links lead somewhere, commands name what there is, both languages say the same, errors are explained."""

import ast
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from fleet_agent.status import STATES
from markdown_it import MarkdownIt
from slot_guard.guard import REFUSALS
from tts_service.errors import CHINESE

from tests.unit.test_refused_inventories import REFUSED, expected_faults

PROJECT = Path(__file__).parents[2]
PLAYBOOKS = [PROJECT / "site.yml", *sorted(PROJECT.glob("playbooks/*.yml"))]
PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")])
GENERATED = {PROJECT / "docs/faults.md", *PROJECT.glob("docs/benchmarks/*.md")}
"""Written by `make faults` and `make bench`, in English alone."""

WRITTEN = [page for page in PAGES if page not in GENERATED]
ENGLISH = [page for page in WRITTEN if not page.name.endswith(".zh-CN.md")]
ARTICLE = "from-the-article"
ERRORS = PROJECT / "docs/errors.md"
YOURS = "inventory/yours"
"""Stands for the reader's own inventory."""


def chinese(page):
    return page.with_name(page.name.replace(".md", ".zh-CN.md"))


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(PROJECT)))


class Document:
    """A page as Markdown has it."""

    def __init__(self, text):
        self.tokens = MarkdownIt("commonmark").enable("table").parse(text)
        children = [child for token in self.tokens if token.type == "inline" for child in token.children]
        self.code = [child.content for child in children if child.type == "code_inline"]
        self.links = [
            child.attrs.get("href") or child.attrs["src"] for child in children if child.type in ("link_open", "image")
        ]
        self.blocks = [token.content for token in self.tokens if token.type in ("code_block", "fence")]

    def headings(self):
        """Level and text of each heading."""
        for token, inline in zip(self.tokens, self.tokens[1:]):
            if token.type == "heading_open":
                yield token.tag, "".join(child.content for child in inline.children)

    def anchors(self):
        """What can stand behind a # in a link to this page, as GitHub makes it."""
        return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text in self.headings()}

    def first_cells(self):
        """The code in the first column of the tables, a list for each section."""
        sections = [[]]
        for token, cell in zip(self.tokens, self.tokens[2:]):
            if token.type == "heading_open":
                sections.append([])
            elif token.type == "tr_open":
                sections[-1] += [child.content for child in cell.children if child.type == "code_inline"]
        return [sorted(section) for section in sections]


@cache
def read(page):
    return Document(page.read_text())


def commands(text):
    """The command lines in a text, as lists of words; what is to be added to one is one too."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|", line):
            if re.match(r"\s*(?:make |python -m |ansible-playbook |(?:playbooks/\w+|site)\.yml\b|-e \w)", command):
                yield shlex.split(command, comments=True)


def commands_of(page):
    document = read(page)
    return [command for text in (*document.blocks, *document.code) for command in commands(text)]


@each(PAGES)
def test_links_lead_somewhere(page):
    for link in read(page).links:
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(PROJECT), link
        assert not anchor or anchor in read(target).anchors(), link


##### Commands


def make_targets():
    text = (PROJECT / "Makefile").read_text()
    for name, value in re.findall(r"^(\w+) := (.*)$", text, re.MULTILINE):
        text = text.replace(f"$({name})", value)
    return {name for names in re.findall(r"^([^\s:#=][^:=\n]*):(?!=)", text, re.MULTILINE) for name in names.split()}


def options_of(module):
    """The long options in the source of a module, or of a whole package."""
    origin = Path(importlib.util.find_spec(module).origin)
    sources = origin.parent.rglob("*.py") if origin.name == "__init__.py" else [origin]
    return {option for source in sources for option in re.findall(r'"(--[\w-]+)"', source.read_text())}


def playbooks_of(playbook):
    """A playbook and all that it imports."""
    plays = yaml.safe_load(playbook.read_text())
    imported = [play["ansible.builtin.import_playbook"] for play in plays if "ansible.builtin.import_playbook" in play]
    return [playbook, *(path for name in imported for path in playbooks_of(playbook.parent / name))]


@cache
def variables_of(playbook):
    """What -e can set: what a playbook, the defaults of its roles and the output ask for, and these defaults."""
    texts = [yaml.safe_dump(yaml.safe_load(path.read_text()), width=10_000) for path in playbooks_of(playbook)]
    roles = {role for text in texts for role in re.findall(r"\b(?:role|name): (\w+)$", text, re.MULTILINE)}
    defaults = [PROJECT / f"roles/{role}/defaults/main.yml" for role in roles]
    texts += [path.read_text() for path in defaults if path.exists()]
    callback = PROJECT / "collections/ansible_collections/gpufleet/core/plugins/callback/document.py"
    found = set(re.findall(r'extra_vars\.get\("(\w+)"\)', callback.read_text()))
    for text in texts:
        found |= set(re.findall(r"^(\w+):", text, re.MULTILINE))
        found |= {word for asked in re.findall(r"\{\{.*?\}\}", text) for word in re.findall(r"\w+", asked)}
    return found


def tags_of(playbook):
    """Tags of a playbook's plays and of their roles."""
    plays = [play for path in playbooks_of(playbook) for play in yaml.safe_load(path.read_text())]
    tagged = [entry.get("tags", []) for play in plays for entry in (play, *play.get("roles", []))]
    return {tag for tags in tagged for tag in ([tags] if isinstance(tags, str) else tags)}


@each(WRITTEN)
def test_commands_name_what_there_is(page):
    for command in commands_of(page):
        program, *arguments = command
        if program == "make":
            assert set(arguments) <= make_targets(), command
        elif program == "python":
            assert {word for word in arguments if word.startswith("--")} <= options_of(arguments[1]), command
        else:
            check_playbook(command)


def check_playbook(command):
    """Of an addition any playbook may be the one that is meant."""
    playbooks = [PROJECT / word for word in command if word.endswith(".yml")] or PLAYBOOKS
    assert set(playbooks) <= set(PLAYBOOKS), command
    for option, value in zip(command, command[1:]):
        if option == "-e":
            assert any(value.split("=")[0] in variables_of(playbook) for playbook in playbooks), command
        elif option == "--tags":
            assert all(set(value.split(",")) <= tags_of(playbook) for playbook in playbooks), command
        elif option == "-i":
            assert value == YOURS or (PROJECT / value).exists(), command


def test_every_playbook_that_is_no_part_of_another_has_its_command():
    parts = {path.resolve() for playbook in PLAYBOOKS for path in playbooks_of(playbook)[1:]}
    named = {PROJECT / word for page in ENGLISH for command in commands_of(page) for word in command}
    assert set(PLAYBOOKS) - parts <= named


@each([page for page in WRITTEN if not page.name.startswith(ARTICLE)])
def test_names_are_names_of_something(page):
    """Variables, fields and the like are in the code. The article has names of its own."""
    folders = ("bench", "collections", "group_vars", "inventory", "playbooks", "roles", "service", "tools")
    files = [path for folder in folders for path in (PROJECT / folder).rglob("*") if path.is_file()]
    sources = [path for path in files if path.suffix in {".py", ".yml", ".j2"}]
    known = {word for path in sources for word in re.findall(r"\w+", f"{path} {path.read_text()}")}
    named = {found[0] for text in read(page).code if (found := re.match(r"[a-z]+(?:_[a-z]+)+\b", text))}
    assert named <= known


##### Languages


def test_every_page_is_there_in_both_languages():
    assert {*ENGLISH, *map(chinese, ENGLISH)} == set(WRITTEN)


@each(ENGLISH)
def test_both_languages_have_the_same_structure(page):
    def levels(document):
        return [level for level, _ in document.headings()]

    def targets(document):
        return sorted(link.partition("#")[0].replace(".zh-CN", "") for link in document.links)

    def without_comments(document):
        return [re.sub(r"\s+# .*", "", block) for block in document.blocks]

    english, translated = read(page), read(chinese(page))
    for aspect in (levels, targets, without_comments, Document.first_cells):
        assert aspect(english) == aspect(translated)


def test_the_picture_is_the_same_in_both_languages():
    pictures = [(PROJECT / f"docs/architecture{language}.svg").read_text() for language in ("", ".zh-CN")]
    english, translated = (re.sub(r">[^<>{}]+<", "><", picture) for picture in pictures)
    assert english == translated


##### Errors

MESSAGES = {
    "AnsibleActionFail",
    "AnsibleFilterError",
    "ArchiveError",
    "CondaError",
    "DrainError",
    "Locked",
    "ProgramsError",
    "Refused",
    "ReleaseError",
    "SourceError",
}
"""Exceptions whose message is for the operator."""


def literal(node):
    """A string in Python with … for what is put into it, or None."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def python_nodes(*folders):
    for folder in folders:
        for path in sorted((PROJECT / folder).rglob("*.py")):
            yield from ast.walk(ast.parse(path.read_text()))


def assertions(tasks):
    """All values of fail_msg in a file's tasks."""
    if isinstance(tasks, dict):
        yield from (value for key, value in tasks.items() if key == "fail_msg")
        yield from assertions(list(tasks.values()))
    elif isinstance(tasks, list):
        for task in tasks:
            yield from assertions(task)


def messages():
    """What our own exceptions, host_check and the playbooks' assertions say."""
    for node in python_nodes("collections", "tools"):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if ast.unparse(node.exc.func) in MESSAGES:
                yield literal(node.exc.args[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "fault":
            yield literal(node.args[2])
    for path in (*PROJECT.glob("roles/*/tasks/*.yml"), *PROJECT.glob("playbooks/*.yml")):
        for text in assertions(yaml.safe_load(path.read_text())):
            yield re.sub(r"\{\{.*?\}\}", "…", text, flags=re.DOTALL)


def says(span, text):
    """Whether a text has the words of a message on the page, in their order."""
    return re.search(".*".join(map(re.escape, span.split("…"))), text, re.DOTALL) is not None


def not_explained(texts):
    """Those of which the page has nothing; the Chinese one has the same messages."""
    spans = [span for section in read(ERRORS).first_cells() for span in section]
    return [text for text in texts if not any(says(span, text) for span in spans)]


@each([ERRORS, chinese(ERRORS)])
def test_every_code_and_state_is_explained(page):
    template = (PROJECT / "roles/gateway/templates/nginx.conf.j2").read_text()
    gateways = set(re.findall(r'\(\d+, "(\w+)", "\w+", "', template))
    assert len(gateways) > 10
    assert {*gateways, *(code for code, _, _ in REFUSALS.values()), *CHINESE, *STATES} <= set(read(page).code)


def test_every_refusal_of_an_inventory_is_explained():
    assert not_explained(line for inventory in REFUSED for line in expected_faults(inventory)) == []


def test_every_message_is_explained():
    found = {text for text in messages() if text and re.search(r"\w{3}", text)}
    assert len(found) > 60
    assert not_explained(sorted(found)) == []


def test_every_explained_message_is_still_there():
    """Of all but the last section, which is about what Ansible says itself."""
    texts = [text for node in python_nodes("collections", "service", "tools") if (text := literal(node))]
    files = [*PROJECT.glob("roles/*/t*/*"), *PROJECT.glob("playbooks/*.yml")]
    texts += [" ".join(path.read_text().split()) for path in files]
    spans = [span for section in read(ERRORS).first_cells()[:-1] for span in section]
    assert [span for span in spans if not any(says(span, text) for text in texts)] == []

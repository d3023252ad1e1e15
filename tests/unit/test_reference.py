"""The tables of the inventory's documents: what the code says, in words that fit."""

import pytest
import yaml

from tools import reference

SETTING = {"services": {"route": reference.Setting(reference.REQUIRED)}}
ROLE = {"agent": reference.Role("Tells the state", {"agent_name": reference.Setting("x", "Name of it.")})}
GOOD = {
    "fields": {"services": {"route": {"en": "path", "zh": "路径"}}},
    "roles": {
        "agent": {"en": "Tells the state", "zh": "给出状态"},
        "agent_name": {"en": "Name of it.", "zh": "它的名称。"},
    },
}


@pytest.mark.parametrize("language", reference.PAGES)
def test_the_pages_are_what_the_code_says(language):
    """If not: python -m tools.reference."""
    page = reference.PAGES[language].read_text()
    blocks = reference.made(language, yaml.safe_load(reference.TEXTS.read_text()))
    assert reference.filled(page, blocks) == page
    assert all(page.count(f"<!-- reference: {name} -->\n\n{block}\n<!-- end") == 1 for name, block in blocks.items())


def test_words_that_fit_have_no_fault():
    assert reference.faults(GOOD, SETTING, ROLE) == []


@pytest.mark.parametrize(
    ("kind", "name", "text", "fault"),
    [
        ("fields", "services", {}, "fields.services.route has no en and no zh"),
        ("fields", "services", {"route": {"en": "path"}}, "fields.services.route has no zh"),
        ("roles", "agent_name", {}, "roles.agent_name has no en and no zh (en: Name of it.)"),
        (
            "roles",
            "agent_name",
            {"en": "Its name.", "zh": "名称。"},
            "roles.agent_name says in its specification now: Name of it. Write that as en, and its zh anew",
        ),
        ("roles", "agent_nam", {"en": "Name of it.", "zh": "它的名称。"}, "roles.agent_nam is nothing that there is"),
    ],
)
def test_words_that_do_not_fit_are_named(kind, name, text, fault):
    assert reference.faults({**GOOD, kind: {**GOOD[kind], name: text}}, SETTING, ROLE) == [fault]


def test_the_command_names_every_fault_and_writes_nothing(monkeypatch, tmp_path, capsys):
    texts = tmp_path / "reference.yml"
    texts.write_text(reference.TEXTS.read_text().replace("  agent_cluster_name:", "  agent_cluster_nam:"))
    pages = {language: tmp_path / language for language in reference.PAGES}
    for page in pages.values():
        page.write_text("<!-- reference: hosts -->\n<!-- end of reference -->\n")
    monkeypatch.setattr(reference, "TEXTS", texts)
    monkeypatch.setattr(reference, "PAGES", pages)
    assert reference.main() == 1
    said = capsys.readouterr().err
    assert "reference.yml: roles.agent_cluster_name has no en and no zh (en: Name of the cluster" in said
    assert "reference.yml: roles.agent_cluster_nam is nothing that there is" in said
    assert all(page.read_text().count("\n") == 2 for page in pages.values())


def test_the_command_writes_the_tables_and_then_nothing_more(monkeypatch, tmp_path, capsys):
    pages = {language: tmp_path / f"{language}.md" for language in reference.PAGES}
    for page in pages.values():
        page.write_text("before\n<!-- reference: hosts -->\n<!-- end of reference -->\nafter\n")
    monkeypatch.setattr(reference, "PAGES", pages)
    assert reference.main() == 0
    assert capsys.readouterr().out.split() == ["en.md", "zh.md"]
    assert "| `gpu_count` | \N{EN DASH} |" in pages["zh"].read_text()
    assert pages["zh"].read_text().startswith("before\n") and pages["zh"].read_text().endswith("\nafter\n")
    assert reference.main() == 0
    assert capsys.readouterr().out == ""


def test_defaults_are_shown_as_yaml_has_them():
    texts = {name: {"en": "It is V(x) | y."} for name in "abcdefg"}
    rows = dict(zip("abcdefg", map(reference.Setting, (5, "", ["x"], {"/a": 2}, "{{ x }}", reference.REQUIRED, True))))
    shown = [line.split(" | ")[1] for line in reference.table(rows, texts, "en").splitlines()[2:]]
    assert shown == ["`5`", "\N{EN DASH}", "`[x]`", "`{/a: 2}`", "derived", "required", "`true`"]
    assert reference.table(rows, texts, "en").count("It is `x` \\| y.") == 7

"""The tables of docs/inventory.md and its Chinese counterpart, from what they describe: python -m tools.reference.

Names and defaults come from the derivation and from the roles' specifications, the words from docs/reference.yml. What
is missing there, left over, or translated from an English that has changed since, is refused with all its faults.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ansible_collections.gpufleet.core.plugins.module_utils.entrance import (
    ACME_FIELDS,
    CONTAINER_FIELDS,
    KEY_FIELDS,
    TLS_FIELDS,
    VIP_FIELDS,
)
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import (
    CODE_FIELDS,
    GPU_FIELDS,
    HOST_VARIABLES,
    REQUIRED,
    SERVICE_FIELDS,
    SMOKE_FIELDS,
    derive,
)

from tools import PROJECT

TEXTS = PROJECT / "docs" / "reference.yml"
PAGES = {"en": PROJECT / "docs" / "inventory.md", "zh": PROJECT / "docs" / "inventory.zh-CN.md"}
"""The pages with the tables, by language."""

NOTHING = "\N{EN DASH}"
COLUMNS = {"en": ("variable", "default", "meaning"), "zh": ("变量", "默认值", "含义")}
NO_LITERAL = {"en": {"required": "required", "derived": "derived"}, "zh": {"required": "必填", "derived": "推导得出"}}
"""What stands in place of a default that is none, or that follows from other settings."""

_PLACE = re.compile(r"(<!-- reference: (\w+) -->\n).*?(<!-- end of reference -->)", re.DOTALL)
_MARKUP = re.compile(r"\b[CVO]\(([^)]*)\)")  # Ansible's for code, values and options


class TextsError(Exception):
    """The words do not fit what is to be described; the message names every fault."""


class Setting(NamedTuple):
    """A variable or field: its default, and its English where a specification has it already."""

    default: Any
    english: str = ""


class Role(NamedTuple):
    """What a role's specification says of it."""

    english: str
    settings: dict[str, Setting]


def fields() -> dict[str, dict[str, Setting]]:
    """What the derivation reads, by table and name."""
    parameters = inspect.signature(derive).parameters
    cluster = {
        "services": REQUIRED,
        "conda_envs": REQUIRED,
        "fleet_port": parameters["port"].default,
        "fleet_gpu_group": parameters["gpu_group"].default,
        "fleet_gateway_group": parameters["gateway_group"].default,
        "fleet_monitoring_group": parameters["monitoring_group"].default,
        "gateway_container": None,
        "gateway_tls": None,
        "api_keys": None,
        "gateway_vip": None,
    }
    defaults: dict[str, Mapping[str, Any]] = {
        "cluster": cluster,
        "hosts": dict.fromkeys((*HOST_VARIABLES, "fleet_address")),
        "gpus": _first_required(GPU_FIELDS),
        "services": SERVICE_FIELDS,
        "code": _first_required(CODE_FIELDS),
        "smoke": _first_required(SMOKE_FIELDS),
        "container": CONTAINER_FIELDS,
        "tls": TLS_FIELDS,
        "acme": _first_required(ACME_FIELDS),
        "api_keys": _first_required(KEY_FIELDS),
        "vip": _first_required(VIP_FIELDS),
    }
    return {table: {name: Setting(value) for name, value in rows.items()} for table, rows in defaults.items()}


def _first_required(names: Sequence[str]) -> dict[str, Any]:
    return {name: None if place else REQUIRED for place, name in enumerate(names)}


def roles(folder: Path = PROJECT / "roles") -> dict[str, Role]:
    """The roles by name; of `preflight` not the entry point whose options are the cluster's variables."""
    found = {}
    for path in sorted(folder.iterdir()):
        main = yaml.safe_load((path / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]
        defaults = yaml.safe_load((path / "defaults" / "main.yml").read_text())
        settings = {
            name: Setting(defaults[name], _joined(option["description"])) for name, option in main["options"].items()
        }
        found[path.name] = Role(_joined(main["short_description"]), settings)
    return found


def faults(texts: Mapping[str, Any], tables: Mapping[str, Any], known_roles: Mapping[str, Role]) -> list[str]:
    """What is wrong with the words, a line each."""
    wanted = {f"fields.{table}.{name}": setting for table, rows in tables.items() for name, setting in rows.items()}
    for role, (english, settings) in known_roles.items():
        wanted[f"roles.{role}"] = Setting(None, english)
        wanted |= {f"roles.{name}": setting for name, setting in settings.items()}
    given = {f"fields.{table}.{name}": text for table, rows in texts["fields"].items() for name, text in rows.items()}
    given |= {f"roles.{name}": text for name, text in texts["roles"].items()}
    found = []
    for name, setting in wanted.items():
        text = given.get(name, {})
        if missing := [language for language in PAGES if not text.get(language)]:
            english = f" (en: {setting.english})" if setting.english else ""
            found.append(f"{name} has no {' and no '.join(missing)}{english}")
        elif setting.english and text["en"] != setting.english:
            found.append(f"{name} says in its specification now: {setting.english} Write that as en, and its zh anew")
    return [*found, *(f"{name} is nothing that there is" for name in given if name not in wanted)]


def made(language: str, texts: Mapping[str, Any]) -> dict[str, str]:
    """The tables in a language, by the name that they have in the pages; TextsError where words do not fit."""
    tables, known_roles = fields(), roles()
    if found := faults(texts, tables, known_roles):
        raise TextsError("\n".join(f"{TEXTS.name}: {line}" for line in found))
    blocks = {name: table(rows, texts["fields"][name], language) for name, rows in tables.items()}
    blocks["roles"] = "\n".join(
        f"### {role}\n\n{_markdown(texts['roles'][role][language])}\n\n{table(settings, texts['roles'], language)}"
        for role, (_, settings) in known_roles.items()
    )
    return blocks


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """A page with the tables in their places, whatever was there."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{blocks[place[2]]}\n{place[3]}", page)


def table(rows: Mapping[str, Setting], texts: Mapping[str, Mapping[str, str]], language: str) -> str:
    """Settings as a table in a language."""
    lines = [COLUMNS[language], ("---",) * 3]
    lines += [
        (f"`{name}`", _default(setting.default, language), _markdown(texts[name][language]))
        for name, setting in rows.items()
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _default(value: Any, language: str) -> str:
    if value is REQUIRED:
        return NO_LITERAL[language]["required"]
    if isinstance(value, str) and "{{" in value:
        return NO_LITERAL[language]["derived"]
    if value is None or value in ("", (), [], {}):
        return NOTHING
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}`"


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else " ".join(text)


def _markdown(text: str) -> str:
    return _MARKUP.sub(r"`\1`", text).replace("|", "\\|")


def main() -> int:
    """Write the pages that differ and name them."""
    texts = yaml.safe_load(TEXTS.read_text())
    try:
        for language, page in PAGES.items():
            found = page.read_text()
            text = filled(found, made(language, texts))
            if text != found:
                page.write_text(text)
                print(page.name)
    except TextsError as error:
        print(f"reference: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

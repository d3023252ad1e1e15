"""Render a role's template as Ansible does: the role's own defaults and the fleet of an inventory."""

import functools
import json
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

PROJECT = Path(__file__).parents[2]


@functools.cache
def _plugins() -> None:
    init_plugin_loader([str(PROJECT / "collections")])


def _trusted(value: Any) -> Any:
    """Return a variable of a role with everything in it that Ansible may template."""
    if isinstance(value, dict):
        return {name: _trusted(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_trusted(entry) for entry in value]
    return trust_as_template(value) if isinstance(value, str) else value


def role_variables(role: str) -> dict[str, Any]:
    """Return the variables of ``roles/<role>/vars``, which :func:`render` can be given."""
    variables = yaml.safe_load((PROJECT / "roles" / role / "vars/main.yml").read_text())
    trusted: dict[str, Any] = _trusted(variables)
    return trusted


def render(role: str, template: str, fleet: dict[str, Any], **variables: Any) -> str:
    """Return the text of ``roles/<role>/templates/<template>`` for a fleet."""
    _plugins()
    folder = PROJECT / "roles" / role
    defaults = _trusted(yaml.safe_load((folder / "defaults/main.yml").read_text()))
    templar = Templar(DataLoader(), {**defaults, "ansible_managed": "Ansible managed", "fleet": fleet, **variables})
    text = (folder / "templates" / template).read_text()
    rendered: str = templar.copy_with_new_env().template(trust_as_template(text))
    return rendered


def role_value(role: str, name: str, fleet: dict[str, Any], **variables: Any) -> Any:
    """Return what a variable of ``roles/<role>/vars`` is for a fleet; its lookups find the role's files.

    Where it needs filters of the collection, this is for a process that has not imported any of it before.
    """
    _plugins()
    folder = PROJECT / "roles" / role
    defaults = _trusted(yaml.safe_load((folder / "defaults/main.yml").read_text()))
    found = {"ansible_search_path": [str(folder)], "ansible_managed": "Ansible managed", "fleet": fleet}
    templar = Templar(DataLoader(), {**defaults, **role_variables(role), **found, **variables})
    return json.loads(templar.template(trust_as_template(f"{{{{ {name} | to_json }}}}")))


def files_made(fleet: dict[str, Any]) -> dict[str, str]:
    """The files that the gateway's tmpfiles.d entry makes, by path."""
    lines = render("gateway", "tmpfiles.conf.j2", fleet).splitlines()
    rules = [line.split(" ", 6) for line in lines if line.startswith("f ")]
    return {path: text.encode().decode("unicode_escape") for _, path, *_, text in rules}

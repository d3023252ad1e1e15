"""Render a role's template as Ansible does: the role's own defaults and the fleet of an inventory."""

import functools
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


def role_variables(role: str) -> dict[str, Any]:
    """Return the variables of ``roles/<role>/vars``, which :func:`render` can be given."""
    variables = yaml.safe_load((PROJECT / "roles" / role / "vars/main.yml").read_text())
    return {name: trust_as_template(value) if isinstance(value, str) else value for name, value in variables.items()}


def render(role: str, template: str, fleet: dict[str, Any], **variables: Any) -> str:
    """Return the text of ``roles/<role>/templates/<template>`` for a fleet."""
    _plugins()
    folder = PROJECT / "roles" / role
    defaults = yaml.safe_load((folder / "defaults/main.yml").read_text())
    templar = Templar(DataLoader(), {**defaults, "ansible_managed": "Ansible managed", "fleet": fleet, **variables})
    text = (folder / "templates" / template).read_text()
    rendered: str = templar.copy_with_new_env().template(trust_as_template(text))
    return rendered


def files_made(fleet: dict[str, Any]) -> dict[str, str]:
    """The files that the gateway's tmpfiles.d entry makes, by path."""
    lines = render("gateway", "tmpfiles.conf.j2", fleet).splitlines()
    rules = [line.split(" ", 6) for line in lines if line.startswith("f ")]
    return {path: text.encode().decode("unicode_escape") for _, path, *_, text in rules}

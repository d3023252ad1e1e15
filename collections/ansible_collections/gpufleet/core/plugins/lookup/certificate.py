# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Lookup gpufleet.core.certificate: the gateway's certificate and key as texts, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.lookup import LookupBase
from ansible_collections.gpufleet.core.plugins.module_utils.faults import Faults
from ansible_collections.gpufleet.core.plugins.plugin_utils.certificate import PEM, judge, shown
from ansible_collections.gpufleet.core.plugins.plugin_utils.project import PROJECT

DOCUMENTATION = r"""
name: certificate
short_description: Certificate and key of the gateway, read and judged on the controller
description:
  - Of each term, a mapping like C(gateway_tls), C(certificate) and C(key) are either texts in PEM or files on the
    controller, which may be encrypted with Ansible Vault. Relative paths start in the project's folder.
options:
  _terms:
    description: Mappings with C(certificate) and C(key).
    required: true
author: gpufleet
"""

RETURN = r"""
_raw:
  description: For each term C(files), texts by name, and C(faults), lines for people.
  type: list
  elements: dict
"""

NAMES = ("certificate", "key")


class LookupModule(LookupBase):
    """Reads with the vault's secrets that this run was given."""

    def run(self, terms: list[Any], variables: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
        """Read and judge each term."""
        return [self._read(term) for term in terms]

    def _read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        faults = Faults()
        files: dict[str, str] = {}
        values = [given.get(name) for name in NAMES]
        if not all(values):  # the derivation of the fleet names what is missing
            return {"files": files, "faults": faults.lines}
        for name, value in zip(NAMES, map(str, values)):
            try:
                files[f"{name}.pem"] = value if PEM in value else self._text(value)
            except (AnsibleError, OSError, ValueError) as error:
                remedy = "Give a file on the controller, or the text in PEM"
                faults.add("all", f"gateway_tls.{name}", shown(value), f"cannot be read: {error}", remedy)
        if not faults.lines:
            certificate, key = files.values()
            judge(certificate, key, (str(values[0]), str(values[1])), datetime.now(timezone.utc), faults)
        return {"files": files, "faults": faults.lines}

    def _text(self, path: str) -> str:
        found = PROJECT / Path(path).expanduser()
        if not found.is_file():
            raise FileNotFoundError("there is no such file")
        text: str = self._loader.get_text_file_contents(str(found))
        return text

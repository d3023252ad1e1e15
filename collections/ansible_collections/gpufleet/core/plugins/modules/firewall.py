#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Ansible module: one nftables table of our own is in force, now and after every boot, or is not there at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.system_files import (
    Commands,
    Refused,
    differences,
    read,
    write,
)

DOCUMENTATION = r"""
module: firewall
short_description: Have one nftables table of our own in force, or none
description:
  - Loads the table C(inet gpufleet) and a systemd unit that loads it at every boot. It is validated with C(nft -c)
    first and replaced in one transaction, so that at no moment half of it holds. If it cannot be loaded, what was
    there before is in force again.
  - No other table is read or changed, and nftables.service, whose start flushes all tables, is not enabled.
options:
  rules:
    description:
      - Text of the rules file. It must replace the table as a whole, and the table's comment must be
        C(@RULES_DIGEST@), which tells whether these rules are the ones in force.
      - Empty means that there is to be no table.
    type: str
    required: true
  unit:
    description: Text of the systemd unit that loads the rules file.
    type: str
    default: ''
author: gpufleet contributors
"""

EXAMPLES = r"""
- name: Let only the gateways reach the instances
  gpufleet.core.firewall:
    rules: "{{ lookup('ansible.builtin.template', 'firewall.nft.j2') }}"
    unit: "{{ lookup('ansible.builtin.template', 'firewall.service.j2') }}"
"""

RETURN = r"""
digest:
  description: Digest of the rules, which the table in force has for its comment; empty where none is wanted.
  type: str
  returned: always
"""

TABLE = ("inet", "gpufleet")
RULES = Path("/etc/gpufleet-firewall.nft")
UNIT = Path("/etc/systemd/system/gpufleet-firewall.service")
DIGEST_MARK = "@RULES_DIGEST@"
REMEDY = (
    "A container needs the capability NET_ADMIN for a firewall of its own. With gpu_workers_firewall: false a host has "
    "none, and whoever reaches it reaches its GPUs past every limit"
)


class Firewall(Commands):
    """The table of this host, the file of its rules and the unit that loads them."""

    def __init__(self, module: AnsibleModule) -> None:
        super().__init__(module)
        rules = module.params["rules"]
        self.digest = hashlib.sha256(rules.encode()).hexdigest()[:16] if rules else ""
        self.wanted = {
            RULES: rules.replace(DIGEST_MARK, self.digest) or None,
            UNIT: module.params["unit"] if rules else None,
        }
        self.found = {path: read(path) for path in self.wanted}
        self.nft = module.get_bin_path("nft")

    def succeeds(self, *command: str) -> bool:
        """Tell whether a command ends well."""
        return self.module.run_command(list(command))[0] == 0

    def table(self) -> str:
        """Return the table in force as nft lists it, or an empty text."""
        return self.module.run_command([self.nft, "list", "table", *TABLE])[1] if self.nft else ""

    def holds(self) -> bool:
        """Tell whether what is wanted is in force and will be after a boot."""
        if not self.digest:
            return not self.table()
        return f'comment "{self.digest}"' in self.table() and self.succeeds(
            "systemctl", "is-enabled", "--quiet", UNIT.name
        )

    def validate(self) -> None:
        """Let nft and the kernel judge the rules; those in force stay."""
        if self.digest:
            self.command(self.nft or "nft", "-c", "-f", "-", text=self.wanted[RULES])

    def switch(self) -> None:
        """Bring files, unit and table to what is wanted, or back to what was found."""
        self.validate()
        try:
            self.bring(self.wanted)
            if not self.holds():
                raise Refused(f"what {RULES} says was loaded and is not in force")
        except (Refused, OSError) as refusal:
            try:
                self.bring(self.found)
            except (Refused, OSError) as second:
                raise Refused(f"{refusal}\nPutting back what was there failed too: {second}") from second
            raise

    def bring(self, texts: dict[Path, str | None]) -> None:
        """Write files and let systemd act on them."""
        if texts[UNIT] is None and read(UNIT) is not None:
            self.command("systemctl", "disable", "--now", "--quiet", UNIT.name)
        for path, text in texts.items():
            if read(path) != text:  # a disk that is full refuses even what it has
                write(path, text)
        self.command("systemctl", "daemon-reload")
        if texts[UNIT] is not None:
            self.command("systemctl", "enable", "--quiet", UNIT.name)
            # A reload, where it runs: a restart would take the table away for a moment.
            self.command("systemctl", "reload-or-restart", UNIT.name)
        elif self.table():
            self.command(str(self.nft), "delete", "table", *TABLE)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"rules": {"type": "str", "required": True}, "unit": {"type": "str", "default": ""}},
        supports_check_mode=True,
    )
    firewall = Firewall(module)
    differing = differences(firewall.found, firewall.wanted)
    result = {"digest": firewall.digest, "changed": bool(differing) or not firewall.holds(), "diff": differing}
    try:
        if module.check_mode:
            if result["changed"] and firewall.nft:  # else the package is only about to be installed
                firewall.validate()
        elif result["changed"]:
            firewall.switch()
    except (Refused, OSError) as refusal:
        module.fail_json(msg=f"The firewall is as it was. {refusal}\n{REMEDY}.", **{**result, "changed": False})
    module.exit_json(**result)


if __name__ == "__main__":
    main()

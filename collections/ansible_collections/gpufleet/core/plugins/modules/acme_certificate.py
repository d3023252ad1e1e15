#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Have the gateway's certificate from an ACME authority, and have nginx read it again whenever it is renewed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.system_files import Refused, read, write

DOCUMENTATION = r"""
module: acme_certificate
short_description: Certificate of the gateway by certbot, with its renewal
description:
  - Asks for a certificate when names or authority are others than those of the last one. Renewals are not its work but
    that of the timer which comes with the package certbot. Either way a hook leads nginx to what was issued.
  - nginx serves plain HTTP on port 80 already, with the answers to challenges out of C(directory).
options:
  names:
    description: Host names of the certificate. Without any, what this module made is removed again.
    type: list
    elements: str
    default: []
  authority:
    description: URL of the authority's ACME directory.
    type: str
    default: ""
  directory:
    description: Where answers to challenges go; below C(tls) are the links that nginx reads.
    type: path
    required: true
author: gpufleet
"""

EXAMPLES = r"""
- name: Have a certificate
  gpufleet.core.acme_certificate:
    names: [tts.example.org]
    authority: https://acme-v02.api.letsencrypt.org/directory
    directory: /var/lib/gpufleet-gateway/acme
"""

RETURN = r"""#"""

LINEAGE = "gpufleet"
LETSENCRYPT = Path("/etc/letsencrypt")
HOOK = """\
#!/bin/sh
# Ansible managed. certbot runs this for every certificate that it has renewed.
set -eu
[ "${{RENEWED_LINEAGE##*/}}" = {lineage} ] || exit 0
ln -sfn "$RENEWED_LINEAGE/fullchain.pem" {directory}/tls/certificate.pem
ln -sfn "$RENEWED_LINEAGE/privkey.pem" {directory}/tls/key.pem
nginx -t -q
systemctl reload nginx
"""


class Certificate:
    """The certificate of this host's gateway, and the traces of the one that was asked for last."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.names = module.params["names"]
        self.directory = Path(module.params["directory"])
        self.live = LETSENCRYPT / "live" / LINEAGE
        self.renewal = LETSENCRYPT / "renewal" / f"{LINEAGE}.conf"
        self.hook = LETSENCRYPT / "renewal-hooks" / "deploy" / LINEAGE
        self.hook_text = HOOK.format(lineage=LINEAGE, directory=self.directory)
        self.issued = self.directory / "issued.json"
        self.request = json.dumps({"names": sorted(self.names), "authority": module.params["authority"]})

    def is_issued(self) -> bool:
        """Tell whether the certificate that is there is the one that is wanted."""
        return self.renewal.exists() and read(self.issued) == self.request

    def is_served(self) -> bool:
        """Tell whether nginx is led to it."""
        link = self.directory / "tls" / "certificate.pem"
        return link.is_symlink() and link.readlink() == self.live / "fullchain.pem"

    def has_hook(self) -> bool:
        """Tell whether nginx will read a renewed one."""
        return read(self.hook) == self.hook_text

    def is_as_wanted(self) -> bool:
        """Tell whether there is nothing to do."""
        if not self.names:
            return not any(path.exists() for path in (self.renewal, self.hook, self.directory))
        return self.is_issued() and self.is_served() and self.has_hook()

    def run(self, *command: str, environment: dict[str, str] | None = None) -> None:
        """Run a command; what it says is the reason of a refusal."""
        code, out, err = self.module.run_command(list(command), environ_update=environment or {})
        if code:
            raise Refused(f"{command[0]} failed with {code}: {(out + err).strip()}")

    def have(self) -> None:
        """Ask for the certificate unless it is there, and lead nginx to it."""
        write(self.hook, self.hook_text, 0o755)
        if not self.is_issued():
            command = ["certbot", "certonly", "--non-interactive", "--agree-tos", "--register-unsafely-without-email"]
            command += ["--webroot", "--webroot-path", str(self.directory), "--cert-name", LINEAGE]
            command += ["--server", self.module.params["authority"], "--force-renewal", "--renew-with-new-domains"]
            self.run(*command, *(word for name in self.names for word in ("--domain", name)))
            write(self.issued, self.request)
        self.run(str(self.hook), environment={"RENEWED_LINEAGE": str(self.live)})

    def forget(self) -> None:
        """Remove what was made: nobody is led to it any more."""
        if self.renewal.exists():
            self.run("certbot", "delete", "--non-interactive", "--cert-name", LINEAGE)
        shutil.rmtree(self.directory, ignore_errors=True)
        write(self.hook, None)  # last: by it host_check knows that there is something to forget


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "default": []},
            "authority": {"type": "str", "default": ""},
            "directory": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    certificate = Certificate(module)
    changed = not certificate.is_as_wanted()
    try:
        if changed and not module.check_mode:
            certificate.have() if certificate.names else certificate.forget()
    except Refused as refusal:
        module.fail_json(msg=f"The certificate for {', '.join(certificate.names)} could not be had. {refusal}")
    module.exit_json(changed=changed)


if __name__ == "__main__":
    main()

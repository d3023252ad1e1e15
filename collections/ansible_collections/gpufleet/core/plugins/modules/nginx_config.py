#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Bring nginx to one whole configuration: validate, switch, reload, prove; or put everything back."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tempfile
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.system_files import Refused, differences, read, write
from ansible_collections.gpufleet.core.plugins.module_utils.unix_http import UnixConnection

DOCUMENTATION = r"""
module: nginx_config
short_description: Serve one whole nginx configuration, or keep the old one
description:
  - Validates the candidate with C(nginx -t) before it replaces the old file, reloads (never restarts) nginx and waits
    until the new configuration answers. If any of that fails, the old files are put back and served again.
  - C(nginx -s reload) says nothing when the new configuration cannot be applied, for instance because a port is taken;
    so the configuration itself tells its digest on a control socket, and only that counts as proof.
options:
  configuration:
    description: Text of F(/etc/nginx/nginx.conf); C(@CONFIGURATION_DIGEST@) in it is replaced by its digest.
    type: str
    required: true
  control_socket:
    description: Unix socket of the server in the configuration that answers C(/digest).
    type: path
    required: true
  tmpfiles:
    description: Text of the tmpfiles.d entry that makes the directories of sockets and flags, and the file of zones.
    type: str
    required: true
  unit_override:
    description: Text of the systemd drop-in of nginx.service.
    type: str
    required: true
  timeout:
    description: Seconds until the new configuration must answer.
    type: int
    default: 15
author: gpufleet
"""

EXAMPLES = r"""
- name: Serve the whole configuration, or keep the old one
  gpufleet.core.nginx_config:
    configuration: "{{ lookup('ansible.builtin.template', 'nginx.conf.j2') }}"
    control_socket: /run/gpufleet-gateway/control.sock
    tmpfiles: "{{ lookup('ansible.builtin.template', 'tmpfiles.conf.j2') }}"
    unit_override: "{{ lookup('ansible.builtin.template', 'systemd.conf.j2') }}"
"""

RETURN = r"""
digest:
  description: Digest of the configuration, as the running nginx tells it.
  type: str
  returned: always
"""

NGINX_CONF = Path("/etc/nginx/nginx.conf")
TMPFILES = Path("/etc/tmpfiles.d/gpufleet-gateway.conf")
UNIT_OVERRIDE = Path("/etc/systemd/system/nginx.service.d/gpufleet.conf")
DIGEST_MARK = "@CONFIGURATION_DIGEST@"


def served_digest(control_socket: str) -> str | None:
    """Return the digest of the configuration that nginx serves now, or None if none of ours answers."""
    connection = UnixConnection(control_socket, timeout=2)
    try:
        connection.request("GET", "/digest")
        response = connection.getresponse()
        return response.read().decode() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


class Gateway:
    """nginx on this host, and the three files that make it the gateway."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        configuration = module.params["configuration"]
        self.digest = hashlib.sha256(configuration.encode()).hexdigest()[:16]
        self.wanted = {
            TMPFILES: module.params["tmpfiles"],
            UNIT_OVERRIDE: module.params["unit_override"],
            NGINX_CONF: configuration.replace(DIGEST_MARK, self.digest),
        }
        self.found = {path: read(path) for path in self.wanted}

    def run(self, *command: str) -> None:
        """Run a command; its error output is the reason of a refusal."""
        code, out, err = self.module.run_command(list(command))
        if code:
            raise Refused(f"{' '.join(command)} failed with {code}: {(err or out).strip()}")

    def serves(self) -> bool:
        """Tell whether nginx serves the wanted configuration and will do so after a reboot."""
        enabled = self.module.run_command(["systemctl", "is-enabled", "--quiet", "nginx"])[0] == 0
        return enabled and served_digest(self.module.params["control_socket"]) == self.digest

    def validate(self) -> None:
        """Let nginx judge the wanted configuration while the old one stays in its place."""
        with tempfile.NamedTemporaryFile("w", dir=NGINX_CONF.parent, prefix=".candidate.", encoding="utf-8") as file:
            file.write(self.wanted[NGINX_CONF])
            file.flush()
            self.run("nginx", "-t", "-q", "-c", file.name)

    def switch(self) -> None:
        """Write, validate and serve the wanted files."""
        for path in (TMPFILES, UNIT_OVERRIDE):
            write(path, self.wanted[path])
        self.run("systemd-tmpfiles", "--create", str(TMPFILES))
        self.validate()
        write(NGINX_CONF, self.wanted[NGINX_CONF])
        self.load()
        deadline = time.monotonic() + self.module.params["timeout"]
        while not self.serves():
            if time.monotonic() > deadline:
                log = self.module.run_command(["tail", "-n", "20", "/var/log/nginx/error.log"])[1]
                raise Refused(f"nginx did not take the new configuration over. The end of its error log:\n{log}")
            time.sleep(0.05)

    def put_back(self) -> None:
        """Serve again what was found."""
        for path, text in self.found.items():
            write(path, text)
        self.load()

    def load(self) -> None:
        """Let systemd read the drop-in and nginx the configuration; a stopped nginx is started."""
        self.run("systemctl", "daemon-reload")
        self.run("systemctl", "enable", "--quiet", "nginx")
        self.run("systemctl", "reload-or-restart", "nginx")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "configuration": {"type": "str", "required": True},
            "control_socket": {"type": "path", "required": True},
            "tmpfiles": {"type": "str", "required": True},
            "unit_override": {"type": "str", "required": True},
            "timeout": {"type": "int", "default": 15},
        },
        supports_check_mode=True,
    )
    gateway = Gateway(module)
    differing = differences(gateway.found, gateway.wanted)
    result = {
        "digest": gateway.digest,
        "changed": bool(differing) or not gateway.serves(),
        "diff": differing,
    }
    try:
        if module.check_mode:
            # Where the tmpfiles are yet to be made, nginx would find neither its sockets' directory nor its zones.
            made = gateway.found[TMPFILES] == gateway.wanted[TMPFILES]
            if differing and made and shutil.which("nginx"):
                gateway.validate()
        elif result["changed"]:
            try:
                gateway.switch()
            except Refused as refusal:
                try:
                    gateway.put_back()
                except Refused as second:
                    raise Refused(f"{refusal}\nPutting the old files back failed too: {second}") from second
                raise
    except Refused as refusal:
        module.fail_json(msg=f"The gateway keeps its old configuration. {refusal}", **{**result, "changed": False})
    module.exit_json(**result)


if __name__ == "__main__":
    main()

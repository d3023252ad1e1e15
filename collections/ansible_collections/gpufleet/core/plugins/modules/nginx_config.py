#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Bring nginx to one whole configuration: validate, switch, reload, prove; or put everything back."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import tempfile
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.system_files import (
    SECRET_MODE,
    Commands,
    Refused,
    Texts,
    differences,
    read,
    write,
)
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
    description:
      - Text of F(/etc/nginx/nginx.conf). In it C(@SECRETS@) is replaced by the folder of the secrets, and then
        C(@CONFIGURATION_DIGEST@) by the digest of the whole.
    type: str
    required: true
  secrets:
    description:
      - Texts of files that only root may read, by name. Their folder is named after their contents, so that one rename
        switches the configuration and all of them. Folders that nothing refers to any more are removed.
    type: dict
    default: {}
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
SECRETS = Path("/etc/nginx/gpufleet")
DIGEST_MARK = "@CONFIGURATION_DIGEST@"
SECRETS_MARK = "@SECRETS@"


def digest_of(text: str) -> str:
    """Return a short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


class Gateway(Commands):
    """nginx on this host, the three files that make it the gateway, and the folder of its secrets."""

    def __init__(self, module: AnsibleModule) -> None:
        super().__init__(module)
        secrets = module.params["secrets"]
        folder = SECRETS / digest_of(json.dumps(secrets, sort_keys=True))
        self.secrets = {folder / name: text for name, text in secrets.items()}
        self.found_secrets = {path: read(path) for path in SECRETS.glob("*/*")}
        configuration = module.params["configuration"].replace(SECRETS_MARK, str(folder))
        self.digest = digest_of(configuration)
        self.wanted = {
            TMPFILES: module.params["tmpfiles"],
            UNIT_OVERRIDE: module.params["unit_override"],
            NGINX_CONF: configuration.replace(DIGEST_MARK, self.digest),
        }
        self.found = {path: read(path) for path in self.wanted}

    def serves(self) -> bool:
        """Tell whether nginx serves the wanted configuration and will do so after a reboot."""
        enabled = self.module.run_command(["systemctl", "is-enabled", "--quiet", "nginx"])[0] == 0
        return enabled and served_digest(self.module.params["control_socket"]) == self.digest

    def validate(self) -> None:
        """Let nginx judge the wanted configuration while the old one stays in its place."""
        with tempfile.TemporaryDirectory(dir=NGINX_CONF.parent, prefix=".candidate.") as folder:
            text = self.wanted[NGINX_CONF]
            for path, secret in self.secrets.items():
                write(Path(folder, path.name), secret, SECRET_MODE)
                text = text.replace(str(path), f"{folder}/{path.name}")
            candidate = Path(folder, NGINX_CONF.name)
            write(candidate, text)
            self.command("nginx", "-t", "-q", "-c", str(candidate))

    def switch(self) -> None:
        """Write, validate and serve the wanted files."""
        for path in (TMPFILES, UNIT_OVERRIDE):
            write(path, self.wanted[path])
        self.command("systemd-tmpfiles", "--create", str(TMPFILES))
        self.validate()
        self.keep_secrets({**self.found_secrets, **self.secrets})
        write(NGINX_CONF, self.wanted[NGINX_CONF])
        self.load()
        deadline = time.monotonic() + self.module.params["timeout"]
        while not self.serves():
            if time.monotonic() > deadline:
                log = self.module.run_command(["tail", "-n", "20", "/var/log/nginx/error.log"])[1]
                raise Refused(f"nginx did not take the new configuration over. The end of its error log:\n{log}")
            time.sleep(0.05)
        self.keep_secrets(self.secrets)

    def put_back(self) -> None:
        """Serve again what was found."""
        for path, text in self.found.items():
            write(path, text)
        self.load()
        self.keep_secrets(self.found_secrets)

    def keep_secrets(self, wanted: Texts) -> None:
        """Have these secrets and no others."""
        for path, text in wanted.items():
            SECRETS.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write(path, text, SECRET_MODE)
        for path in set(SECRETS.glob("*/*")) - set(wanted):
            path.unlink()
        for folder in (*SECRETS.glob("*"), *SECRETS.parent.glob(SECRETS.name)):
            if not any(folder.iterdir()):
                folder.rmdir()

    def load(self) -> None:
        """Let systemd read the drop-in and nginx the configuration; a stopped nginx is started."""
        self.command("systemctl", "daemon-reload")
        self.command("systemctl", "enable", "--quiet", "nginx")
        self.command("systemctl", "reload-or-restart", "nginx")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "configuration": {"type": "str", "required": True},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
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
        "changed": bool(differing) or gateway.found_secrets != gateway.secrets or not gateway.serves(),
        "diff": differing,
    }
    try:
        if module.check_mode:
            # Where the tmpfiles are yet to be made, nginx would find neither its sockets' directory nor its zones.
            made = gateway.found[TMPFILES] == gateway.wanted[TMPFILES]
            if result["changed"] and made and shutil.which("nginx"):
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

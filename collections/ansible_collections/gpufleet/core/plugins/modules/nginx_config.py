#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Bring nginx to one whole configuration: validate, switch, reload, prove; or put everything back."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

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
  - nginx runs as a service of the host, or with O(container) in one of Docker's. Whichever of the two is not wanted and
    was made by this module is stopped and removed, once the other is ready to take its place.
  - C(nginx -s reload) says nothing when the new configuration cannot be applied, for instance because a port is taken;
    so the configuration itself tells its digest on a control socket, and only that counts as proof.
  - An inner server that leaves says 429 on its socket for as long as old workers know it. These servers are in
    F(leaving.conf) beside O(control_socket), which the configuration must include where it is there.
options:
  state:
    description:
      - V(present) needs O(configuration), O(control_socket), O(tmpfiles) and O(unit_override).
      - V(absent) stops what this module made and removes its files and secrets. An nginx that is not its own it leaves.
    type: str
    choices: [present, absent]
    default: present
  configuration:
    description:
      - Text of F(/etc/nginx/nginx.conf), or F(/etc/gpufleet-gateway/nginx.conf) with O(container). In it C(@SECRETS@)
        is replaced by the folder of the secrets, and then C(@CONFIGURATION_DIGEST@) by the digest of the whole.
    type: str
  secrets:
    description:
      - Texts of files that only root may read, by name. Their folder is named after their contents, so that one rename
        switches the configuration and all of them. Folders that nothing refers to any more are removed.
    type: dict
    default: {}
  control_socket:
    description: Unix socket of the server in the configuration that answers C(/digest).
    type: path
  tmpfiles:
    description: Text of the tmpfiles.d entry that makes the directories of sockets and flags, and the file of zones.
    type: str
  unit_override:
    description: Text of the systemd drop-in of nginx.service.
    type: str
  container:
    description: Where given, nginx runs in a container, by Docker and its compose, in either version.
    type: dict
    suboptions:
      image:
        description: Name of the image, as in O(container.compose).
        type: str
        required: true
      compose:
        description: Text of F(/etc/gpufleet-gateway/docker-compose.yml), with the service C(nginx).
        type: str
        required: true
      dockerfile:
        description: Text of what the image is built from. Left out, it is one that compose can pull.
        type: str
      logrotate:
        description: Text of the rule by which the host rotates its logs.
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

- name: Be no gateway any more
  gpufleet.core.nginx_config:
    state: absent
"""

RETURN = r"""
digest:
  description: Digest of the configuration, as the running nginx tells it.
  type: str
  returned: when it is to be present
digest_before:
  description: What nginx told before, where it told one.
  type: str
  returned: when it is to be present
"""

NGINX_CONF = Path("/etc/nginx/nginx.conf")
TMPFILES = Path("/etc/tmpfiles.d/gpufleet-gateway.conf")
UNIT_OVERRIDE = Path("/etc/systemd/system/nginx.service.d/gpufleet.conf")
SECRETS = Path("/etc/nginx/gpufleet")
CONTAINER = Path("/etc/gpufleet-gateway")
LOGROTATE = Path("/etc/logrotate.d/gpufleet-gateway")
CONTAINER_NAME = "gpufleet-gateway"  # also that of its compose project, and of an image that is built here
DIGEST_MARK = "@CONFIGURATION_DIGEST@"
SECRETS_MARK = "@SECRETS@"
#: Workers of another group than the host's www-data would find no inner server, which nginx -t does not notice.
JUDGE = """\
[ "$(id -g www-data)" = "$(stat -c %g "${1%/*}")" ] || { echo "its group www-data is not the host's" >&2; exit 1; }
exec nginx -t -q -c "$0"
"""
_INNER_SERVER = re.compile(r"^ *listen unix:(\S+);$", re.MULTILINE)


def digest_of(text: str) -> str:
    """Return a short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def leaving_servers(before: str, text: str) -> str | None:
    """Return servers for the sockets of inner servers that a configuration has no more, or None where all stay.

    At a reload nginx unlinks the sockets that left, while its old workers go on with their requests: one may choose its
    GPU long after, when a slow upload is complete. Without the socket it would end as 502; so it is sent to others.
    """
    left = sorted(set(_INNER_SERVER.findall(before)) - set(_INNER_SERVER.findall(text)))
    return "".join(f"server {{\n    listen unix:{socket};\n    return 429;\n}}\n" for socket in left) or None


def has_old_workers() -> bool:
    """Tell whether a worker of an earlier configuration still has requests, be it in a container."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if path.read_bytes().startswith(b"nginx: worker process is shutting down"):
                return True
    return False


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


class Gateway(Commands, ABC):
    """nginx somewhere on this host, the files that make it the gateway, and the folder of its secrets.

    ``files`` are those besides its configuration and the tmpfiles. One that does not stay shall have none of all these.
    """

    error_log: str

    def __init__(self, module: AnsibleModule, stays: bool, configuration: Path, secrets: Path, files: Texts) -> None:
        super().__init__(module)
        self.configuration, self.secrets_root = configuration, secrets
        texts = module.params["secrets"] if stays else {}
        folder = secrets / digest_of(json.dumps(texts, sort_keys=True))
        self.secrets = {folder / name: text for name, text in texts.items()}
        self.found_secrets = {path: read(path) for path in secrets.glob("*/*")}
        text = (module.params["configuration"] or "").replace(SECRETS_MARK, str(folder))
        self.digest = digest_of(text)
        self.text = text.replace(DIGEST_MARK, self.digest)
        self.is_here = any(path.exists() for path in files)
        shared = stays or module.params["state"] == "absent"
        self.wanted: dict[Path, str | None] = {TMPFILES: module.params["tmpfiles"]} if shared else {}
        self.wanted |= {path: text if stays else None for path, text in files.items()}
        self.wanted[configuration] = self.text if stays else None
        self.found = {path: read(path) for path in self.wanted}

    @abstractmethod
    def is_set_up(self) -> bool:
        """Tell whether it runs as it shall, after a reboot too."""

    @abstractmethod
    def can_judge(self) -> bool:
        """Tell whether there is an nginx to ask."""

    @abstractmethod
    def judge(self, folder: Path) -> None:
        """Let nginx judge the configuration in a folder."""

    @abstractmethod
    def load(self) -> None:
        """Have nginx run with the files that are there; one that runs already only reads its configuration again."""

    @abstractmethod
    def stop(self) -> None:
        """Have it stopped, after a reboot too."""

    def served(self) -> str | None:
        """Return the digest of what nginx serves now."""
        return served_digest(self.module.params["control_socket"])

    def validate(self) -> None:
        """Let nginx judge the wanted configuration while the old one stays in its place."""
        with tempfile.TemporaryDirectory(dir=self.configuration.parent, prefix=".candidate.") as folder:
            text = self.text
            for path, secret in self.secrets.items():
                write(Path(folder, path.name), secret, SECRET_MODE)
                text = text.replace(str(path), f"{folder}/{path.name}")
            write(Path(folder, self.configuration.name), text)
            self.judge(Path(folder))

    def switch(self, leaving: Gateway | None) -> None:
        """Write, validate and serve the wanted files, instead of the one that leaves."""
        for path, text in self.wanted.items():
            if path != self.configuration:
                write(path, text)
        self.command("systemd-tmpfiles", "--create", str(TMPFILES))
        self.validate()
        self.keep_secrets({**self.found_secrets, **self.secrets})
        if leaving:
            leaving.stop()
        self.keep_answering(self.found[self.configuration], self.text)
        write(self.configuration, self.text)
        self.take_over()
        self.settle()
        if leaving:
            leaving.forget()

    def keep_answering(self, before: str | None, text: str | None) -> None:
        """Have an answer for old workers where one configuration replaces another, and for still older ones."""
        path = Path(self.module.params["control_socket"]).with_name("leaving.conf")
        older = read(path) if has_old_workers() else None
        write(path, leaving_servers(f"{before or ''}\n{older or ''}", text or ""))

    def take_over(self) -> None:
        """Have nginx serve the configuration."""
        self.load()
        deadline = time.monotonic() + self.module.params["timeout"]
        while self.served() != self.digest or not self.is_set_up():
            if time.monotonic() > deadline:
                log = self.module.run_command(["tail", "-n", "20", self.error_log])[1]
                raise Refused(f"nginx did not take the new configuration over. The end of its error log:\n{log}")
            time.sleep(0.05)

    def put_back(self, leaving: Gateway | None) -> None:
        """Serve again what was found; a disk that is full may refuse its files, and nginx runs all the same."""
        try:
            for path, text in self.found.items():
                if read(path) != text:
                    write(path, text)
            if not leaving:
                self.keep_answering(self.text, self.found[self.configuration])
        finally:
            if leaving:
                self.stop()
                leaving.load()
            else:
                self.load()
        self.keep_secrets(self.found_secrets)

    def forget(self) -> None:
        """Leave no file of it."""
        for path, text in self.wanted.items():
            write(path, text)
        self.settle()

    def settle(self) -> None:
        """Remove what was replaced."""
        self.keep_secrets(self.secrets)

    def keep_secrets(self, wanted: Texts) -> None:
        """Have these secrets and no others."""
        for path, text in wanted.items():
            self.secrets_root.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write(path, text, SECRET_MODE)
        for path in set(self.secrets_root.glob("*/*")) - set(wanted):
            path.unlink()
        for folder in (*self.secrets_root.glob("*"), *self.secrets_root.parent.glob(self.secrets_root.name)):
            if not any(folder.iterdir()):
                folder.rmdir()


class Native(Gateway):
    """nginx as a service of the host."""

    error_log = "/var/log/nginx/error.log"

    def __init__(self, module: AnsibleModule, stays: bool) -> None:
        super().__init__(module, stays, NGINX_CONF, SECRETS, {UNIT_OVERRIDE: module.params["unit_override"]})

    def is_set_up(self) -> bool:
        """Tell whether systemd starts it; that it runs, its answer tells."""
        return self.module.run_command(["systemctl", "is-enabled", "--quiet", "nginx"])[0] == 0

    def can_judge(self) -> bool:
        """Tell whether nginx is installed."""
        return shutil.which("nginx") is not None

    def judge(self, folder: Path) -> None:
        """Ask it."""
        self.command("nginx", "-t", "-q", "-c", str(folder / self.configuration.name))

    def load(self) -> None:
        """Let systemd read the drop-in and nginx the configuration; a stopped nginx is started."""
        self.command("systemctl", "daemon-reload")
        self.command("systemctl", "enable", "--quiet", "nginx")
        self.command("systemctl", "reload-or-restart", "nginx")

    def stop(self) -> None:
        """Stop and disable the service."""
        self.command("systemctl", "disable", "--now", "--quiet", "nginx")


class Container(Gateway):
    """nginx in a container, which sees these files, the sockets, zones and flags under the host's own paths."""

    error_log = "/var/log/gpufleet-gateway/error.log"

    def __init__(self, module: AnsibleModule, stays: bool) -> None:
        given = module.params["container"] or {}
        self.image: str = given.get("image", "")
        self.build = bool(given.get("dockerfile"))
        files = {
            CONTAINER / "docker-compose.yml": given.get("compose"),
            CONTAINER / "Dockerfile": given.get("dockerfile"),
            LOGROTATE: given.get("logrotate"),
        }
        super().__init__(module, stays, CONTAINER / "nginx.conf", CONTAINER / "secrets", files)

    def is_set_up(self) -> bool:
        """Tell whether it runs, from the image that bears its name now; Docker starts it after a reboot."""
        running = self.docker("container", "inspect", "--format", "{{.State.Running}} {{.Image}}", CONTAINER_NAME)
        return running == f"true {self.docker('image', 'inspect', '--format', '{{.Id}}', self.image)}"

    def can_judge(self) -> bool:
        """Tell whether its image is here."""
        return self.docker("image", "inspect", self.image) != ""

    def judge(self, folder: Path) -> None:
        """Ask nginx in a container of its own, from the image that is wanted, which is built or pulled before."""
        for path in self.wanted:
            if path.parent == CONTAINER and path != self.configuration:
                write(folder / path.name, self.wanted[path])
        if self.build and not self.can_judge():
            self.compose(folder, "build")
        arguments = ["-c", JUDGE, str(folder / self.configuration.name), self.module.params["control_socket"]]
        self.compose(folder, "run", "--rm", "-T", "--entrypoint", "sh", "nginx", *arguments)

    def load(self) -> None:
        """Have the container as in its files, or none; one that need not be made anew reloads nginx."""
        if not (CONTAINER / "docker-compose.yml").exists():
            self.stop()
            return
        started = ("container", "inspect", "--format", "{{.Id}} {{.State.StartedAt}}", CONTAINER_NAME)
        before = self.docker(*started)
        self.compose(CONTAINER, "up", "--detach")
        if self.docker(*started) == before:
            # Not docker kill, whatever its signal: to Docker the container is one that somebody stopped from then on.
            self.command("docker", "exec", CONTAINER_NAME, "nginx", "-s", "reload", "-c", str(self.configuration))

    def stop(self) -> None:
        """Remove the container."""
        if self.docker("container", "inspect", CONTAINER_NAME):
            self.command("docker", "stop", CONTAINER_NAME)
            self.command("docker", "rm", CONTAINER_NAME)

    def settle(self) -> None:
        """Remove what was replaced, images that were built here included."""
        super().settle()
        for image in self.docker("images", "--format", "{{.Repository}}:{{.Tag}}", CONTAINER_NAME).split():
            if image != self.image:
                self.docker("rmi", image)
        if CONTAINER.is_dir() and not any(CONTAINER.iterdir()):
            CONTAINER.rmdir()

    def docker(self, *arguments: str) -> str:
        """Return what a docker command prints, without the line's end; nothing where it fails or there is no Docker."""
        if not shutil.which("docker"):
            return ""
        code, out, _ = self.module.run_command(["docker", *arguments])
        return out.strip() if code == 0 else ""

    def compose(self, folder: Path, *arguments: str) -> None:
        """Run compose, which is a plugin of Docker or, in its first version, a program of its own."""
        plugin = self.docker("compose", "version") != ""
        command = ["docker", "compose"] if plugin else ["docker-compose"]
        self.command(*command, "-p", CONTAINER_NAME, "-f", str(folder / "docker-compose.yml"), *arguments)


def be_present(module: AnsibleModule) -> dict[str, Any]:
    """Serve the configuration where it shall be served, and nowhere else; return the result."""
    contained = module.params["container"] is not None
    native, container = Native(module, not contained), Container(module, contained)
    gateway, other = (container, native) if contained else (native, container)
    leaving = other if other.is_here else None
    differing = [difference for one in (gateway, leaving) if one for difference in differences(one.found, one.wanted)]
    before = gateway.served()
    serves = before == gateway.digest and gateway.is_set_up()
    changed = bool(differing) or gateway.found_secrets != gateway.secrets or not serves
    result = {"digest": gateway.digest, "digest_before": before, "changed": changed, "diff": differing}
    try:
        if module.check_mode:
            # Where the tmpfiles are yet to be made, nginx would find neither its sockets' directory nor its zones.
            made = gateway.found[TMPFILES] == gateway.wanted[TMPFILES]
            if changed and made and gateway.can_judge():
                gateway.validate()
        elif changed:
            try:
                gateway.switch(leaving)
            except (Refused, OSError) as refusal:
                try:
                    gateway.put_back(leaving)
                except (Refused, OSError) as second:
                    raise Refused(f"{refusal}\nPutting the old files back failed too: {second}") from second
                raise
    except (Refused, OSError) as refusal:
        module.fail_json(msg=f"The gateway keeps its old configuration. {refusal}", **{**result, "changed": False})
    return result


def be_absent(module: AnsibleModule) -> dict[str, Any]:
    """Serve nothing, and leave none of its files; return the result."""
    leaving = [gateway for gateway in (Native(module, False), Container(module, False)) if gateway.is_here]
    differing = [difference for gateway in leaving for difference in differences(gateway.found, gateway.wanted)]
    result = {"changed": bool(leaving), "diff": differing}
    try:
        for gateway in [] if module.check_mode else leaving:
            gateway.stop()
            gateway.forget()
    except (Refused, OSError) as refusal:
        module.fail_json(msg=f"It is still a gateway. {refusal}", **result)
    return result


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "configuration": {"type": "str"},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
            "control_socket": {"type": "path"},
            "tmpfiles": {"type": "str"},
            "unit_override": {"type": "str"},
            "container": {
                "type": "dict",
                "options": {
                    "image": {"type": "str", "required": True},
                    "compose": {"type": "str", "required": True},
                    "dockerfile": {"type": "str"},
                    "logrotate": {"type": "str", "required": True},
                },
            },
            "timeout": {"type": "int", "default": 15},
        },
        required_if=[("state", "present", ("configuration", "control_socket", "tmpfiles", "unit_override"))],
        supports_check_mode=True,
    )
    module.exit_json(**(be_present(module) if module.params["state"] == "present" else be_absent(module)))


if __name__ == "__main__":
    main()

"""The module that switches nginx: one rename for the configuration and its secrets, and all put back on failure.

And the two places where nginx can be, of which one takes over from the other.
"""

import contextlib
import errno
import json
import os
from pathlib import Path

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpufleet.core.plugins.modules import nginx_config

CONFIGURATION = "key @SECRETS@/key.pem; digest @CONFIGURATION_DIGEST@; {}"
NGINX = """#!/bin/sh
# Takes a configuration whose key can be read and is no nonsense.
while [ "$1" != -c ]; do shift; done
key=$(sed -n 's/^key \\([^;]*\\);.*/\\1/p' "$2")
[ ! "$key" ] || grep -q '^good' "$key" || { echo "cannot load key $key" >&2; exit 1; }
"""


SYSTEMCTL = """#!/bin/sh
echo "$@" >> {host.seen}
[ "$1" != reload-or-restart ] || {{ cat {host.conf}; echo "<end>"; }} >> {host.served_so_far}
"""

# An engine in files: `image` is there once it was built, `running` while the container is; both hold the image's id.
DOCKER = """#!/bin/sh
cd {root}
echo "docker $*" >> seen
case "$*" in
    "compose version") exit 1 ;;
    "container inspect --format {{{{.State.Running}}}} {{{{.Image}}}} "*) echo "true $(cat running)" ;;
    "container inspect "*) cat running ;;
    "image inspect "*) cat image ;;
    "images "*) echo "$(cat built)" ;;
    "rm "*) rm running ;;
    "rmi "*) rm built image ;;
esac
"""
COMPOSE = """#!/bin/sh
cd {root}
shift 4
echo "compose $*" >> seen
case "$1" in
    build) [ ! -e no_build ] || {{ echo "no such base image" >&2; exit 1; }}
        echo ours:1 > built; echo id > image ;;
    run) shift 8; exec nginx -c "$1" ;;
    up) cp image running ;;
esac
"""
CONTAINER = {"image": "ours:1", "compose": "compose", "dockerfile": "FROM base", "logrotate": "rule"}


class Host:
    """A machine below a folder: its nginx serves what is in its file, unless it is told to go on as before."""

    def __init__(self, root, monkeypatch, capsys):
        self.conf, self.secrets = root / "etc/nginx.conf", root / "etc/gpufleet"
        self.conf.parent.mkdir()
        self.conf.write_text("as the distribution has it")
        self.root, self.container = root, root / "container"
        self.deaf, self.leaving, self.has_old_workers = root / "deaf", root / "run/leaving.conf", False
        self.seen, self.served_so_far = root / "seen", root / "served"
        bin_folder = root / "bin"
        bin_folder.mkdir()
        programs = {
            "nginx": NGINX,
            "systemd-tmpfiles": "#!/bin/sh\n",
            "systemctl": SYSTEMCTL.format(host=self),
            "docker": DOCKER.format(root=root),
            "docker-compose": COMPOSE.format(root=root),
        }
        for name, text in programs.items():
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
        monkeypatch.setattr(nginx_config, "NGINX_CONF", self.conf)
        monkeypatch.setattr(nginx_config, "TMPFILES", root / "tmpfiles.conf")
        monkeypatch.setattr(nginx_config, "UNIT_OVERRIDE", root / "unit.conf")
        monkeypatch.setattr(nginx_config, "SECRETS", self.secrets)
        monkeypatch.setattr(nginx_config, "CONTAINER", self.container)
        monkeypatch.setattr(nginx_config, "LOGROTATE", root / "logrotate.conf")
        monkeypatch.setattr(nginx_config, "served_digest", self.served)
        monkeypatch.setattr(nginx_config, "has_old_workers", lambda: self.has_old_workers)
        self._capsys = capsys

    def served(self, _):
        """The digest of what nginx serves."""
        conf = self.container / "nginx.conf" if (self.root / "running").exists() else self.conf
        words = conf.read_text(errors="replace").split("digest ")
        return words[1].split(";")[0] if len(words) > 1 and not self.deaf.exists() else None

    def run(self, secrets, text="", check=False, **more):
        """Run the module; return its result, as it prints it too."""
        arguments = {"configuration": CONFIGURATION.format(text), "secrets": secrets}
        arguments["control_socket"] = str(self.leaving.with_name("control.sock"))
        arguments |= {"tmpfiles": "t", "unit_override": "u", "timeout": 0, "_ansible_check_mode": check, **more}
        if not secrets:
            arguments["configuration"] = arguments["configuration"].replace("key @SECRETS@/key.pem; ", "")
        return self._call(arguments)

    def absent(self, check=False):
        """Have it be no gateway."""
        return self._call({"state": "absent", "_ansible_check_mode": check})

    def _call(self, arguments):
        self._capsys.readouterr()
        with patch_module_args(arguments), contextlib.suppress(SystemExit):
            nginx_config.main()
        self.said = self._capsys.readouterr().out
        return json.loads(self.said)

    def kept(self):
        """Secrets by their path, with their modes."""
        return {
            str(path.relative_to(self.secrets)): (path.read_text(), oct(path.stat().st_mode & 0o777))
            for path in self.secrets.rglob("*")
            if path.is_file()
        }

    def folder(self):
        """Where the configuration finds its secrets."""
        return self.conf.read_text().split("key ")[1].split("/key.pem")[0]


@pytest.fixture
def host(tmp_path, monkeypatch, capsys):
    return Host(tmp_path, monkeypatch, capsys)


def test_secrets_are_roots_alone_and_lie_where_the_configuration_looks(host):
    assert host.run({"key.pem": "good 1"})["changed"]
    name = Path(host.folder()).name
    assert host.folder() == str(host.secrets / name)
    assert host.kept() == {f"{name}/key.pem": ("good 1", "0o600")}
    assert {oct(folder.stat().st_mode & 0o777) for folder in (host.secrets, host.secrets / name)} == {"0o700"}
    assert not host.run({"key.pem": "good 1"})["changed"]


def test_a_new_secret_is_a_change_of_the_configuration_and_the_old_one_is_removed(host):
    host.run({"key.pem": "good 1"})
    before = host.folder()
    result = host.run({"key.pem": "good 2"})
    assert result["changed"] and before != host.folder()
    assert result["digest_before"] not in (None, result["digest"])
    assert "good" not in host.said
    assert [text for text, _ in host.kept().values()] == ["good 2"]
    assert host.run({})["changed"]
    assert not host.secrets.exists()
    assert not host.run({})["changed"]


def test_what_somebody_did_to_a_secret_is_undone(host):
    host.run({"key.pem": "good 1"})
    Path(host.folder(), "key.pem").write_text("good 3")
    Path(host.folder(), "other").write_text("x")
    assert host.run({"key.pem": "good 1"})["changed"]
    assert [text for text, _ in host.kept().values()] == ["good 1"]


def inner_servers(*names):
    return "".join(f"\n    listen unix:/run/{name}.sock;" for name in names)


def answering(host):
    """Sockets on which somebody is sent away."""
    text = host.leaving.read_text() if host.leaving.exists() else ""
    return {line.split("/run/")[1].split(".sock")[0] for line in text.splitlines() if "listen" in line}


def test_an_inner_server_that_leaves_sends_everybody_away_while_old_workers_know_it(host):
    host.run({}, inner_servers("a", "b", "c"))
    assert not host.leaving.exists()
    assert host.run({}, inner_servers("a", "b"))["changed"]
    assert "listen unix:/run/c.sock;\n    return 429;" in host.leaving.read_text()
    assert not host.run({}, inner_servers("a", "b"))["changed"]
    assert host.served_so_far.read_text().count("<end>") == 2
    host.has_old_workers = True
    host.run({}, inner_servers("a"))
    assert answering(host) == {"b", "c"}
    host.run({}, inner_servers("a", "c"))
    assert answering(host) == {"b"}
    host.has_old_workers = False
    host.run({}, inner_servers("a", "c", "d"))
    assert not host.leaving.exists()


def test_of_a_configuration_that_was_put_back_only_the_new_inner_servers_leave(host):
    host.run({}, inner_servers("a", "b"))
    host.deaf.touch()
    assert host.run({}, inner_servers("a", "new"))["failed"]
    assert answering(host) == {"new"}


def test_a_secret_that_nginx_refuses_is_brought_nowhere(host):
    host.run({"key.pem": "good 1"})
    before = (host.conf.read_text(), host.kept())
    result = host.run({"key.pem": "bad"})
    assert result["failed"] and "cannot load key" in result["msg"]
    assert (host.conf.read_text(), host.kept()) == before
    assert [path.name for path in host.conf.parent.iterdir()] == ["gpufleet", "nginx.conf"]


def test_what_nginx_does_not_take_over_is_put_back_with_its_secrets(host):
    host.run({"key.pem": "good 1"})
    before = (host.conf.read_text(), host.kept())
    host.deaf.touch()
    result = host.run({"key.pem": "good 2"})
    assert result["failed"] and "did not take the new configuration over" in result["msg"]
    assert (host.conf.read_text(), host.kept()) == before
    assert host.seen.read_text().splitlines()[-1] == "reload-or-restart nginx"


def test_check_mode_judges_and_leaves_no_trace(host):
    host.run({"key.pem": "good 1"})
    before = (host.conf.read_text(), host.kept())
    result = host.run({"key.pem": "good 2"}, check=True)
    assert result["changed"] and not result.get("failed")
    assert host.run({"key.pem": "bad"}, check=True)["failed"]
    assert (host.conf.read_text(), host.kept()) == before


def order(host, *words):
    """What was done, by the first of these words that each line has."""
    lines = host.seen.read_text().splitlines()
    host.seen.unlink()
    return [next(word for word in words if word in line) for line in lines if any(word in line for word in words)]


def files(host):
    found = {path for path in host.root.rglob("*") if path.is_file() and path.parent.name not in ("bin", "run")}
    return {path.name for path in found - {host.seen, host.served_so_far}}


def test_a_container_takes_over_once_its_nginx_has_judged_and_leaves_as_it_came(host):
    host.run({"key.pem": "good 1"})
    steps = (
        "disable --now",
        "compose build",
        "compose run",
        "compose up",
        "-s reload",
        "docker stop",
        "docker rmi",
        "reload-or",
    )
    order(host, *steps)
    assert host.run({"key.pem": "good 1"}, container=CONTAINER)["changed"]
    assert order(host, *steps) == ["compose build", "compose run", "disable --now", "compose up"]
    assert not host.conf.exists() and not host.secrets.exists()
    assert "nginx.conf" in files(host) and "unit.conf" not in files(host)
    assert not host.run({"key.pem": "good 1"}, container=CONTAINER)["changed"]

    assert host.run({"key.pem": "good 2"}, container=CONTAINER)["changed"]
    assert order(host, *steps) == ["compose run", "compose up", "-s reload"]

    assert host.run({"key.pem": "good 2"})["changed"]
    assert order(host, *steps) == ["docker stop", "reload-or", "docker rmi"]
    assert not host.container.exists()
    assert files(host) == {"nginx.conf", "key.pem", "tmpfiles.conf", "unit.conf"}


@pytest.mark.parametrize("trouble", ["no_build", "deaf"])
def test_where_the_container_does_not_come_up_the_host_s_nginx_goes_on(host, trouble):
    host.run({"key.pem": "good 1"})
    before = (host.conf.read_text(), host.kept(), files(host) | {trouble})
    (host.root / trouble).touch()
    result = host.run({"key.pem": "good 1"}, container=CONTAINER)
    assert result["failed"] and "keeps its old configuration" in result["msg"]
    assert (host.conf.read_text(), host.kept(), files(host) - {"built", "image"}) == before
    assert host.seen.read_text().splitlines()[-1] == "reload-or-restart nginx"


def test_a_disk_that_is_full_in_mid_switch_leaves_the_host_s_nginx_running(host, monkeypatch):
    host.run({"key.pem": "good 1"})
    before = (host.conf.read_text(), host.kept(), files(host))

    def refuse(path, text, *mode):
        if text is not None and host.seen.read_text().endswith("disable --now --quiet nginx\n"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text, *mode)

    write = nginx_config.write
    monkeypatch.setattr(nginx_config, "write", refuse)
    result = host.run({"key.pem": "good 1"}, container=CONTAINER)
    assert result["failed"] and "keeps its old configuration. [Errno 28]" in result["msg"]
    assert (host.conf.read_text(), host.kept(), files(host) - {"built", "image"}) == before
    assert host.seen.read_text().splitlines()[-1] == "reload-or-restart nginx"


def test_what_somebody_wrote_in_another_encoding_is_shown_as_can_be_and_put_back_as_it_was(host):
    before = "# 网关\r\n".encode("gbk")
    host.conf.write_bytes(before)
    host.deaf.touch()
    result = host.run({}, _ansible_diff=True)
    assert result["failed"] and host.conf.read_bytes() == before
    (shown,) = (one["before"] for one in result["diff"] if one["before_header"] == str(host.conf))
    assert shown.encode().decode().startswith("# \N{REPLACEMENT CHARACTER}")
    assert host.run({}, container=CONTAINER, check=True)["changed"]


def test_a_container_that_is_not_there_any_more_or_of_an_older_image_is_a_change(host):
    host.run({}, container=CONTAINER)
    for file, text in (("running", "other"), ("image", "newer")):
        (host.root / file).write_text(text)
        assert host.run({}, container=CONTAINER)["changed"]
        assert (host.root / "running").read_text() == (host.root / "image").read_text()


def test_of_somebody_else_s_nginx_nothing_is_touched(host):
    assert host.run({}, container=CONTAINER)["changed"]
    assert host.conf.read_text() == "as the distribution has it"
    assert "disable" not in host.seen.read_text()


@pytest.mark.parametrize("place", [{}, {"container": CONTAINER}])
def test_what_is_no_gateway_any_more_keeps_no_file_and_no_secret_of_it(host, place):
    host.run({"key.pem": "good 1"}, **place)
    before = files(host)
    assert host.absent(check=True)["changed"] and files(host) == before
    assert host.absent()["changed"]
    assert files(host) == ({"nginx.conf"} if place else set())
    assert not (host.secrets.exists() or host.container.exists() or (host.root / "running").exists())
    assert ("disable --now" in host.seen.read_text()) is not bool(place)
    assert not host.absent()["changed"]


def test_what_never_was_a_gateway_keeps_its_nginx(host):
    assert not host.absent()["changed"]
    assert files(host) == {"nginx.conf"} and not host.seen.exists()

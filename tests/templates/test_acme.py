"""A certificate from an authority: Debian's certbot and Pebble, the one made for tests, through the rendered nginx."""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpufleet.core.plugins.modules import acme_certificate

from testbed.shell import provide
from tests.certificate import self_signed
from tests.templates.conftest import PORT, article_fleet
from tests.unit.service_helpers import free_port

NAME = "tts.example.org"


def wait_for(port):
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nobody listens at {port}")


@pytest.fixture
def authority(tmp_path, monkeypatch):
    """Pebble, which looks for answers at our port of plain HTTP: the URL of its directory."""
    provide({"pebble": "pebble", "certbot": "certbot", "openssl": "openssl"})
    self_signed(tmp_path, "localhost", "127.0.0.1")
    listening, dns = free_port(), free_port()
    settings = {
        "listenAddress": f"127.0.0.1:{listening}",
        "managementListenAddress": f"127.0.0.1:{free_port()}",
        "certificate": str(tmp_path / "certificate.pem"),
        "privateKey": str(tmp_path / "key.pem"),
        "httpPort": PORT,
        "tlsPort": 1,
    }
    (tmp_path / "pebble.json").write_text(json.dumps({"pebble": settings}))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "certificate.pem"))
    every_name_is_here = ["pebble-challtestsrv", "-dns01", f"127.0.0.1:{dns}", "-defaultIPv6", ""]
    every_name_is_here += [word for kind in ("http01", "https01", "tlsalpn01") for word in (f"-{kind}", "")]
    every_name_is_here += ["-management", f"127.0.0.1:{free_port()}"]
    pebble = ["pebble", "-config", str(tmp_path / "pebble.json"), "-dnsserver", f"127.0.0.1:{dns}"]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "pebble.log").open("w"))
        for command in (every_name_is_here, pebble):
            # Else it delays its checks, and refuses one request in twenty to try its clients.
            environment = {**os.environ, "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0"}
            process = stack.enter_context(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            stack.callback(process.kill)
        wait_for(dns)
        wait_for(listening)
        yield f"https://localhost:{listening}/dir"


@pytest.fixture
def certbot(gateway, tmp_path, monkeypatch):
    """certbot with files of its own, and a systemctl that reloads this test's nginx."""
    folder = tmp_path / "letsencrypt"
    (tmp_path / "letsencrypt.ini").write_text("")
    settings = "".join(
        f"{kind}-dir = {folder}{sub}\n" for kind, sub in (("config", ""), ("work", "/w"), ("logs", "/l"))
    )
    (tmp_path / "config/letsencrypt").mkdir(parents=True)
    (tmp_path / "config/letsencrypt/cli.ini").write_text(settings)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, does in (
        ("systemctl", f'echo "$@" >> {tmp_path}/systemctl; kill -HUP $(cat {gateway.folder}/run/nginx.pid)'),
        ("nginx", f'exec {gateway.program} -e stderr -c {gateway.configuration} "$@"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(acme_certificate, "LETSENCRYPT", folder)
    return folder


def have(capsys, directory, authority="", names=(), check=False):
    """Run the module; return its result."""
    arguments = {"names": list(names), "authority": authority, "directory": str(directory)}
    capsys.readouterr()
    with patch_module_args({**arguments, "_ansible_check_mode": check}), contextlib.suppress(SystemExit):
        acme_certificate.main()
    return json.loads(capsys.readouterr().out)


def served_serial(port):
    """Names and serial number of the certificate that the gateway shows."""
    shown = ssl.get_server_certificate(("127.0.0.1", port))
    command = ["openssl", "x509", "-noout", "-serial", "-ext", "subjectAltName"]
    return subprocess.run(command, input=shown, check=True, capture_output=True, text=True).stdout


def until_another_is_served(port, before):
    for _ in range(200):
        if (now := served_serial(port)) != before:
            return now
        time.sleep(0.02)
    raise AssertionError("nginx has not read the certificate again")


def test_a_certificate_is_issued_served_renewed_and_forgotten(gateway, authority, certbot, tmp_path, capsys):
    tls_port = free_port()
    acme = {"names": [NAME], "authority": "https://ca.example.org/directory"}
    fleet = article_fleet(entrance={"gateway_tls": {"acme": acme, "port": tls_port}})
    fleet["tls"]["plain_ports"] = [PORT]  # not 80, where others may listen on this machine
    directory = Path(f"{gateway.folder}{fleet['acme_directory']}")
    (directory / "tls").mkdir(parents=True)
    self_signed(directory / "tls", "localhost")  # stands in
    gateway.write(fleet)
    gateway.start()
    try:
        first = served_serial(tls_port)
        assert have(capsys, directory, authority, [NAME], check=True)["changed"]
        assert served_serial(tls_port) == first
        result = have(capsys, directory, authority, [NAME])
        assert result.get("changed"), result
        issued = until_another_is_served(tls_port, first)
        assert f"DNS:{NAME}" in issued
        assert not have(capsys, directory, authority, [NAME])["changed"]

        renewal = subprocess.run(
            ["certbot", "renew", "--force-renewal", "--quiet", "--no-random-sleep-on-renew"],
            capture_output=True,
            text=True,
        )
        assert renewal.returncode == 0, renewal.stderr
        renewed = until_another_is_served(tls_port, issued)
        assert not have(capsys, directory, authority, [NAME])["changed"]

        assert have(capsys, directory, authority, [NAME, f"www.{NAME}"])["changed"]
        assert f"DNS:www.{NAME}" in until_another_is_served(tls_port, renewed)
        assert set((tmp_path / "systemctl").read_text().split("\n")) == {"reload nginx", ""}
    finally:
        gateway.stop()
    assert have(capsys, directory)["changed"]
    assert not have(capsys, directory)["changed"]
    assert not directory.exists()
    assert not [path for path in certbot.rglob("*") if path.is_file() and "gpufleet" in str(path.relative_to(certbot))]


def test_what_an_authority_says_is_told(gateway, authority, certbot, capsys, tmp_path):
    """Nothing listens where it looks for the answer."""
    (tmp_path / "acme").mkdir()
    result = have(capsys, tmp_path / "acme", authority, [NAME])
    assert result["failed"]
    assert result["msg"].startswith(f"The certificate for {NAME} could not be had. certbot failed with 1: ")
    assert "connection refused" in result["msg"].lower()
    assert have(capsys, tmp_path / "acme", authority, [NAME], check=True)["changed"], "it is tried again"

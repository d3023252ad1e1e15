"""What is said of the gateway's certificate before any host is touched, and that nothing is ever said of its key."""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.gpufleet.core.plugins.module_utils.faults import Faults
from ansible_collections.gpufleet.core.plugins.plugin_utils.certificate import judge
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from tests.unit.test_fleet import PROJECT

NOW = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
DAY = datetime.timedelta(days=1)


def issue(name, key, signer=None, signed_by=None, begins=-DAY, ends=DAY):
    """A certificate in PEM, signed by itself or by the key of another name."""
    subject, issuer = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, one)]) for one in (name, signed_by or name)
    )
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(NOW + begins).not_valid_after(NOW + ends)
    return builder.sign(signer or key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def pem(key, password=None):
    """A private key in PEM."""
    protection = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection).decode()


OWN, ROOT, OTHER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
SHORT = rsa.generate_private_key(65537, 1024)
LEAF, CA = issue("leaf", OWN, ROOT, "ca"), issue("ca", ROOT)
C, K = "all: gateway_tls.certificate = 'c.pem': ", "all: gateway_tls.key = 'k.pem': "


def faults_of(certificate, key, given=("c.pem", "k.pem")):
    """What is said of a pair."""
    faults = Faults()
    judge(certificate, key, given, NOW, faults)
    return faults.lines


@pytest.mark.parametrize("key", [OWN, rsa.generate_private_key(65537, 2048)], ids=["EC", "RSA"])
def test_a_good_pair_is_taken(key):
    assert faults_of(issue("leaf", key), pem(key)) == []
    assert faults_of(issue("leaf", key, ROOT, "ca") + CA, pem(key)) == []


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        (LEAF, pem(OTHER), f"{K}not the key of the certificate. Give the two that belong together."),
        (CA + LEAF, pem(OWN), f"{C}another one comes before that of the key. Give the gateway's own first."),
        (
            LEAF + issue("other", OTHER),
            pem(OWN),
            f"{C}that of CN=leaf is not signed by the one behind it. Give each before the one that signed it, and the "
            "root not at all.",
        ),
        (
            issue("leaf", OWN, begins=-3 * DAY, ends=-DAY),
            pem(OWN),
            f"{C}that of CN=leaf has expired at {NOW - DAY:%Y-%m-%d %H:%M} UTC. Give a renewed one.",
        ),
        (
            LEAF + issue("ca", ROOT, begins=-3 * DAY, ends=-DAY),
            pem(OWN),
            f"{C}that of CN=ca has expired at {NOW - DAY:%Y-%m-%d %H:%M} UTC. Give a renewed one.",
        ),
        (
            issue("leaf", OWN, begins=DAY, ends=2 * DAY),
            pem(OWN),
            f"{C}that of CN=leaf is valid from {NOW + DAY:%Y-%m-%d %H:%M} UTC on. Wait until then, or set this "
            "machine's clock.",
        ),
        (
            issue("leaf", SHORT),
            pem(SHORT),
            f"{K}of 1024 bits, and nginx takes none below 2048. Have a certificate issued for a longer one.",
        ),
        (
            LEAF,
            pem(OWN, b"hunter2"),
            f"{K}protected by a password, for which nginx would ask. Give it without, and protect it with Ansible "
            "Vault.",
        ),
        (
            LEAF,
            LEAF,
            f"{K}no private key in PEM. Give the key that belongs to the certificate.",
        ),
        (
            LEAF.replace("M", "!"),
            pem(OWN),
            f"{C}no certificate in PEM. Give the certificate and those that signed it, in order.",
        ),
    ],
)
def test_what_nginx_or_clients_would_refuse_is_refused(certificate, key, said):
    assert said in faults_of(certificate, key)


def test_texts_in_the_inventory_are_not_told():
    (said,) = faults_of(LEAF, pem(OTHER), (LEAF, pem(OTHER)))
    assert (
        said == "all: gateway_tls.key = '(hidden)': not the key of the certificate. Give the two that belong together."
    )


@pytest.fixture
def show(tmp_path):
    """Run a playbook that derives and connects to no host, with a gateway_tls; `vaulted` is in it."""

    def run(gateway_tls, vaulted="", playbook="show"):
        services = {"tts": {"route": "/tts/", "app": "a:a", "code": {"source": "."}, "conda_env": "tts"}}
        variables = {"services": services, "conda_envs": {"tts": {"lock": "envs/tts"}}, "gateway_tls": gateway_tls}
        variables["services"]["tts"]["client_limit"] = 1
        groups = {
            "gpu_servers": {"hosts": {"gpu01": {"gpu_count": 1, "ansible_host": "10.0.0.1"}}},
            "gateways": {"hosts": {"gateway": {"ansible_host": "10.0.0.100"}}},
        }
        text = yaml.safe_dump({"all": {"vars": variables, "children": groups}})
        (tmp_path / "inventory.yml").write_text(text.replace("VAULTED", vaulted))
        done = ansible("playbook", "-i", tmp_path / "inventory.yml", f"playbooks/{playbook}.yml", "-vvvv")
        return done.returncode, done.stdout + done.stderr

    (tmp_path / "password").write_text("open sesame")

    def ansible(program, *arguments, **how):
        call = [Path(sys.executable).with_name(f"ansible-{program}"), *arguments]
        settings = {"ANSIBLE_CONFIG": PROJECT / "ansible.cfg", "ANSIBLE_VAULT_PASSWORD_FILE": tmp_path / "password"}
        environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path), **{k: str(v) for k, v in settings.items()}}
        return subprocess.run(call, cwd=PROJECT, env=environment, capture_output=True, text=True, **how)

    run.ansible = ansible
    return run


def test_a_key_may_be_a_file_or_a_text_in_a_vault_or_not(show, tmp_path):
    (tmp_path / "cert.pem").write_text(LEAF)
    (tmp_path / "key.pem").write_text(pem(OWN))
    (tmp_path / "vaulted.pem").write_text(pem(OWN))
    assert show.ansible("vault", "encrypt", tmp_path / "vaulted.pem").returncode == 0
    text = show.ansible("vault", "encrypt_string", input=pem(OWN)).stdout
    for key in (str(tmp_path / "key.pem"), str(tmp_path / "vaulted.pem"), pem(OWN), "VAULTED"):
        code, said = show({"certificate": str(tmp_path / "cert.pem"), "key": key}, text)
        assert code == 0, said
        assert "https://10.0.0.100:9443" in said
        assert pem(OWN).splitlines()[1] not in said


def test_a_bad_pair_ends_the_run_with_one_message_before_any_host(show, tmp_path):
    (tmp_path / "cert.pem").write_text(LEAF)
    code, said = show({"certificate": str(tmp_path / "cert.pem"), "key": pem(OTHER)})
    assert code != 0
    assert "The inventory is refused; no host was touched." in said
    assert "all: gateway_tls.key = '(hidden)': not the key of the certificate." in said
    assert pem(OTHER).splitlines()[1] not in said
    code, said = show({"certificate": "nowhere.pem", "key": str(tmp_path / "cert.pem")})
    assert code != 0
    assert "all: gateway_tls.certificate = 'nowhere.pem': cannot be read: there is no such file." in said
    code, said = show({"certificate": "nowhere.pem", "key": "nowhere.pem"}, playbook="preflight")
    assert code == 0, said  # what brings no certificate needs none: a GPU can be drained

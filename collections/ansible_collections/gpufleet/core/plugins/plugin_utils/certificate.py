# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Whether certificate and key will do for the gateway: neither nginx nor clients refuse them. On the controller."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from ansible_collections.gpufleet.core.plugins.module_utils.faults import HIDDEN, Faults
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

LEAST_RSA_BITS = 2048  # OpenSSL's security level 2, with which Debian and Ubuntu build nginx

PEM = "-----BEGIN "


def shown(value: str) -> str:
    """Return what may be told of a value that is a path or a text."""
    return HIDDEN if PEM in value else value


def judge(certificate: str, key: str, given: tuple[str, str], now: datetime, faults: Faults) -> None:
    """Note what is wrong with a certificate chain and its key, both in PEM.

    :param given: what the inventory has for the two, paths or texts.
    :param now: when the certificate must be valid.
    """
    for_certificate = "all", "gateway_tls.certificate", shown(given[0])
    for_key = "all", "gateway_tls.key", shown(given[1])
    try:
        chain = x509.load_pem_x509_certificates(certificate.encode())
    except ValueError:
        faults.add(*for_certificate, "no certificate in PEM", "Give the certificate and those that signed it, in order")
        return
    try:
        private_key = load_pem_private_key(key.encode(), password=None)
    except TypeError:
        problem = "protected by a password, for which nginx would ask"
        faults.add(*for_key, problem, "Give it without, and protect it with Ansible Vault")
        return
    except ValueError:
        faults.add(*for_key, "no private key in PEM", "Give the key that belongs to the certificate")
        return
    public = [one.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for one in chain]
    own = private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if own in public[1:]:
        faults.add(*for_certificate, "another one comes before that of the key", "Give the gateway's own first")
    elif own not in public:
        faults.add(*for_key, "not the key of the certificate", "Give the two that belong together")
    if isinstance(private_key, rsa.RSAPrivateKey) and private_key.key_size < LEAST_RSA_BITS:
        problem = f"of {private_key.key_size} bits, and nginx takes none below {LEAST_RSA_BITS}"
        faults.add(*for_key, problem, "Have a certificate issued for a longer one")
    for one in chain:
        name = one.subject.rfc4514_string()
        if now > one.not_valid_after_utc:
            problem = f"that of {name} has expired at {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            faults.add(*for_certificate, problem, "Give a renewed one")
        elif now < one.not_valid_before_utc:
            problem = f"that of {name} is valid from {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on"
            faults.add(*for_certificate, problem, "Wait until then, or set this machine's clock")
    _refuse_broken_chain(chain, for_certificate, faults)


def _refuse_broken_chain(chain: Sequence[x509.Certificate], where: tuple[str, str, str], faults: Faults) -> None:
    for one, signer in zip(chain, chain[1:]):
        try:
            one.verify_directly_issued_by(signer)
        except (ValueError, TypeError, InvalidSignature):
            problem = f"that of {one.subject.rfc4514_string()} is not signed by the one behind it"
            faults.add(*where, problem, "Give each before the one that signed it, and the root not at all")

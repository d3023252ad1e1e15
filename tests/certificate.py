"""A certificate for tests, which nobody has signed."""

import subprocess
from pathlib import Path

from testbed.shell import provide


def self_signed(folder: Path, *names: str) -> Path:
    """Make certificate.pem for a host of these names and IP addresses, and key.pem, in a folder, and return that."""
    provide({"openssl": "openssl"})
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={names[0]}", "-days", "2"]
    files = ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem"]
    alternatives = ",".join(f"{'IP' if name.replace('.', '').isdigit() else 'DNS'}:{name}" for name in names)
    subprocess.run([*command, "-addext", f"subjectAltName={alternatives}", *files], check=True, capture_output=True)
    return folder

"""Docker containers that behave like servers: systemd, sshd, an address of their own, nothing else installed.

The demo and the molecule scenarios get their hosts from here; everything past "sshd answers" is Ansible's work.
"""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
STATE = PROJECT / ".cache" / "testbed"

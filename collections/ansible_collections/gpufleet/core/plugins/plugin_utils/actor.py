# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Who runs a playbook, for locks, flags and the audit log; on the controller."""

from __future__ import annotations

import getpass
import os
import socket


def actor() -> str:
    """Return ``user@controller``; behind sudo the user who called it."""
    return f"{os.environ.get('SUDO_USER') or getpass.getuser()}@{socket.gethostname()}"

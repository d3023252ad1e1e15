"""The guarded app as a server runs it: `gunicorn --worker-class asgi slot_guard.asgi:app`, set up by SLOT_GUARD_*."""

import logging
import os

from slot_guard.guard import SlotGuard
from slot_guard.settings import Settings

_handler = logging.StreamHandler()
_handler.setFormatter(logging.Formatter("[%(asctime)s] [%(process)d] [%(levelname)s] slot_guard: %(message)s"))
_logger = logging.getLogger("slot_guard")
_logger.setLevel(logging.INFO)
_logger.addHandler(_handler)
# An app that sets up the root logger must not make every line of ours appear twice.
_logger.propagate = False

app = SlotGuard(Settings.from_environment(os.environ))

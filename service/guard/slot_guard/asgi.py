"""The guarded app as a server runs it: `gunicorn --worker-class asgi slot_guard.asgi:app`, set up by SLOT_GUARD_*."""

import os
import signal
from types import FrameType
from typing import Optional

from slot_guard.guard import SlotGuard
from slot_guard.logs import tell_requests
from slot_guard.settings import Settings

tell_requests()

app = SlotGuard(Settings.from_environment(os.environ))


def _terminate(number: int, frame: Optional[FrameType]) -> None:
    """Send away at once who waits: a server tells its app of a stop only when the last connection is closed."""
    app.stop_soon()
    if callable(_server_terminates):
        _server_terminates(number, frame)


# An event loop that handles the signal does so beside this: it reads of it from its own file descriptor.
_server_terminates = signal.signal(signal.SIGTERM, _terminate)

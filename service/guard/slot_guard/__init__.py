"""slot_guard: run any ASGI app with a fixed number of slots that are held until the work is really over.

Standard library only, Python 3.10 or newer. A server runs `slot_guard.asgi:app`; SlotGuard is the wrapper itself.
"""

from slot_guard.guard import SlotGuard
from slot_guard.settings import Settings

__all__ = ["Settings", "SlotGuard"]

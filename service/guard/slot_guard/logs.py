"""Log lines that say which request they are about: the guard's, the server's, and those of the app."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The X-Request-ID of the request that the running code works for, as the gateway's access log has it."""


class RequestFormatter(logging.Formatter):
    """A line for people; at its end the request, where there is one."""

    def __init__(self) -> None:
        super().__init__("[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format the first line; a traceback comes behind it."""
        current = getattr(record, "request_id", "-")
        return super().formatMessage(record) + (f" request_id={current}" if current != "-" else "")


def tell_requests() -> None:
    """Have every record of this process carry ``request_id``, which an app's own formats can name, and show it.

    It shows in the lines of the guard and of Gunicorn, and of an app that sets up no logging.
    """
    make = logging.getLogRecordFactory()

    def make_with_request(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.request_id = request_id.get()
        return record

    logging.setLogRecordFactory(make_with_request)
    formatter, handler = RequestFormatter(), logging.StreamHandler()
    handler.setFormatter(formatter)
    guard = logging.getLogger("slot_guard")
    guard.setLevel(logging.INFO)
    guard.addHandler(handler)
    # An app that sets up the root logger must not make every line of ours appear twice.
    guard.propagate = False
    for known in logging.getLogger("gunicorn.error").handlers:
        known.setFormatter(formatter)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(formatter)

"""A simulated GPU: an ASGI app that takes its time and keeps a ledger of it. There is no GPU and no model.

`?seconds=0.5` is how long the work takes; `?pieces=3` streams the answer, its first piece at once.
"""

from __future__ import annotations

import asyncio
import os
from urllib.parse import parse_qs

from slot_guard.messages import Receive, Scope, Send
from tts_service.ledger import Ledger

ledger = Ledger(os.environ["BENCH_LEDGER"], os.environ["SLOT_GUARD_INSTANCE"])
PIECE = bytes(1024)
HEAD = {"type": "http.response.start", "status": 200}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the request to its end, work, answer."""
    if scope["type"] == "lifespan":
        for stage in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{stage}.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
    seconds, pieces = float(query.get("seconds", "0")), int(query.get("pieces", "0"))
    kind = (b"content-type", b"application/octet-stream")
    if not pieces:
        with ledger.inference(""):
            await asyncio.sleep(seconds)
        await send({**HEAD, "headers": [kind, (b"content-length", b"1024")]})
        await send({"type": "http.response.body", "body": PIECE})
        return
    with ledger.inference(""):
        await send({**HEAD, "headers": [kind]})
        for _ in range(pieces):
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            await asyncio.sleep(seconds / pieces)
    await send({"type": "http.response.body", "body": b""})

"""The text-to-speech service with simulated faults around it; the fault matrix rolls it out beside tts_service.

A file of SIMULATED_FAULTS named like the card says how all its answers are: a status (500, 503, 429), or `short` for
fewer bytes than announced. Headers of a request ask for more: X-Simulated-Name is what the ledger calls it, so that one
without an answer is found there; X-Simulated-Death kills the process in mid-work; X-Simulated-Megabytes makes its
answer so much longer.
"""

import asyncio
import os
from pathlib import Path

from tts_service.app import app as service

FAULT = Path(os.environ["SIMULATED_FAULTS"], os.environ["CUDA_VISIBLE_DEVICES"])
DEATH_SECONDS = 0.3
MEGABYTE = 1 << 20


async def app(scope, receive, send):
    """Fail as told; else be the service."""
    if scope["type"] != "http":
        return await service(scope, receive, send)
    headers = dict(scope["headers"])
    if FAULT.exists():
        return await fail(FAULT.read_text().strip(), receive, send)
    if b"x-simulated-death" in headers:
        asyncio.get_running_loop().call_later(DEATH_SECONDS, os._exit, 1)
    if name := headers.get(b"x-simulated-name"):
        scope = {**scope, "headers": [*{**headers, b"x-request-id": name}.items()]}
    megabytes = int(headers.get(b"x-simulated-megabytes", b"0"))
    return await service(scope, receive, longer(send, megabytes) if megabytes else send)


async def fail(fault, receive, send):
    """Answer at once as a broken app would."""
    while (await receive()).get("more_body"):
        pass
    body = b'{"error": {"code": "simulated"}}'
    status, length = (200, 1000) if fault == "short" else (int(fault), len(body))
    headers = [(b"content-length", str(length).encode()), (b"x-simulated", fault.encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def longer(send, megabytes):
    """A `send` that adds so many megabytes to the answer."""

    async def padded(message):
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            headers[b"content-length"] = str(int(headers[b"content-length"]) + megabytes * MEGABYTE).encode()
            message = {**message, "headers": [*headers.items()]}
        elif not message.get("more_body"):
            await send({**message, "more_body": True})
            for _ in range(megabytes - 1):
                await send({"type": "http.response.body", "body": bytes(MEGABYTE), "more_body": True})
            message = {"type": "http.response.body", "body": bytes(MEGABYTE)}
        await send(message)

    return padded

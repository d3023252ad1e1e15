"""A service whose start never ends."""

import asyncio


async def app(scope, receive, send):
    """Hang in the lifespan's startup."""
    await asyncio.sleep(3600)

"""A service that starts well and answers every request with an error."""


async def app(scope, receive, send):
    """Have no lifespan; answer 500."""
    if scope["type"] == "lifespan":
        return
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"wrong"})

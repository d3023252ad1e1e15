"""The HTTP side of the service: what a request may say, and how the speech goes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from typing import Annotated

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from starlette.types import Receive, Scope, Send

from tts_service.engines import Engine, UnknownVoice, Utterance, load_engine
from tts_service.errors import FieldError, install_error_handlers
from tts_service.ledger import Ledger
from tts_service.settings import Settings
from tts_service.wav import wav_header

MEDIA_TYPE = "audio/wav"

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a request whose client has left; nobody receives it."""


class SpeechRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # A constrained string is checked for valid Unicode too: JSON can escape half a character.
    text: Annotated[str, Field(min_length=1)]
    stream: bool = False
    voice: Annotated[str, Field(max_length=40)] | None = None
    speed: Annotated[float, Field(ge=0.5, le=2.0)] = 1.0

    @field_validator("text")
    @classmethod
    def not_blank(cls, text: str) -> str:
        """Refuse a text without a visible character."""
        if not text.strip():
            raise PydanticCustomError("blank", "Text should not be blank")
        return text


class WavStream(StreamingResponse):
    """A WAV file sent while it is produced; its production is over before the request is, whatever cuts it short."""

    media_type = MEDIA_TYPE

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        """Send `pieces`, and close them in the end."""
        super().__init__(pieces)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        async with aclosing(self._pieces):
            await super().__call__(scope, receive, send)


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """Build the service around `engine`, or around the one that the settings name, which is loaded here."""
    speaker = engine or load_engine(settings.engine)
    ledger = Ledger(settings.ledger, settings.instance)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)

    @app.post(f"{settings.route}audio-generate")
    async def audio_generate(body: SpeechRequest, request: Request) -> Response:
        if len(body.text) > settings.max_characters:
            message = f"String should have at most {settings.max_characters} characters"
            raise FieldError("text", "string_too_long", message)
        utterance = Utterance(body.text, body.voice, body.speed, body.stream)
        inference = _recorded(speaker, utterance, ledger, request.headers.get("x-request-id", ""))
        if body.stream:
            # The first piece comes before the answer begins: what fails at once fails with a status that says so.
            first = await anyio.to_thread.run_sync(next, inference, b"")
            return WavStream(_streamed(request, wav_header(speaker.sample_rate) + first, _in_threads(inference)))
        pcm = bytearray()
        async with aclosing(_in_threads(inference)) as pieces:
            async for piece in pieces:
                pcm += piece
                if await request.is_disconnected():
                    return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(wav_header(speaker.sample_rate, len(pcm)) + pcm, media_type=MEDIA_TYPE)

    return app


def _recorded(engine: Engine, utterance: Utterance, ledger: Ledger, request_id: str) -> Generator[bytes, None, None]:
    """Run one inference, in whatever thread asks for its next piece."""
    try:
        with ledger.inference(request_id):
            yield from engine.speak(utterance)
    except UnknownVoice as error:
        raise FieldError("voice", "unknown_voice", f"There is no voice {error}") from error


async def _in_threads(pieces: Generator[bytes, None, None]) -> AsyncGenerator[bytes, None]:
    """Iterate in worker threads, so that nothing that an engine does holds the event loop."""
    try:
        while (piece := await anyio.to_thread.run_sync(next, pieces, None)) is not None:
            yield piece
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(pieces.close)


async def _streamed(request: Request, first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """One piece, then the rest, while the client is there."""
    async with aclosing(rest):
        yield first
        async for piece in rest:
            if await request.is_disconnected():
                return
            yield piece

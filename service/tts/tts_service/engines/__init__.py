"""Speech engines behind one interface: espeak (real), simulated (for tests and load), and any package.module:Class."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast


class UnknownVoice(ValueError):
    """The engine has no such voice."""


@dataclass(frozen=True)
class Utterance:
    """What is to be said, and how."""

    text: str
    voice: str | None = None
    """A voice of the engine's; None lets it choose by the text."""
    speed: float = 1.0
    """1 is the voice's own pace."""
    stream: bool = False
    """The caller wants pieces as early as the engine has them."""


class Engine(Protocol):
    """A speech engine. It is loaded when it is constructed, without arguments, and may be used from several threads."""

    sample_rate: int
    """Samples per second of what `speak` gives."""

    def speak(self, utterance: Utterance) -> Iterator[bytes]:
        """Give the utterance as pieces of mono PCM, 16 bits, little-endian; UnknownVoice before the first.

        Runs in a worker thread and may block. A generator is closed when its client has left: it then ends its work.
        """
        ...


BUILT_IN = {"espeak": "tts_service.engines.espeak:Espeak", "simulated": "tts_service.engines.simulated:Simulated"}


def load_engine(name: str) -> Engine:
    """Construct the engine of this name: a built-in one or package.module:Class."""
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    if not attribute:
        raise ValueError(f"TTS_ENGINE is {name!r}; it must be one of {', '.join(BUILT_IN)} or package.module:Class")
    engine = cast("Callable[[], Engine]", operator.attrgetter(attribute)(importlib.import_module(module)))
    return engine()

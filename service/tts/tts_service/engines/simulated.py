"""A pretended engine for tests and load: takes its time and hums."""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Iterator

from tts_service.engines import Utterance

PIECES = 10
"""Pieces of a streamed utterance; a whole one cannot be interrupted, like a kernel on a GPU."""


class Simulated:
    """Sleeps TTS_SIMULATED_SECONDS (default 1) per utterance and gives a tone of the same length.

    Loading takes TTS_SIMULATED_LOAD_SECONDS (default 0).
    """

    sample_rate = 16000

    def __init__(self) -> None:
        """Sleep as a model would load."""
        self.seconds = float(os.environ.get("TTS_SIMULATED_SECONDS", "1"))
        time.sleep(float(os.environ.get("TTS_SIMULATED_LOAD_SECONDS", "0")))

    def speak(self, utterance: Utterance) -> Iterator[bytes]:
        """Give the tone, in equal pieces when streamed."""
        pieces = PIECES if utterance.stream else 1
        tone = self._tone(self.seconds / pieces)
        for _ in range(pieces):
            time.sleep(self.seconds / pieces)
            yield tone

    def _tone(self, seconds: float) -> bytes:
        """440 Hz at a tenth of full scale."""
        period = [round(3276 * math.sin(2 * math.pi * 440 * i / self.sample_rate)) for i in range(self.sample_rate)]
        count = round(seconds * self.sample_rate)
        samples = (period * (count // len(period) + 1))[:count]
        return struct.pack(f"<{count}h", *samples)

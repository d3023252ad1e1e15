"""A pretended engine for tests and load: takes its time and hums."""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tts_service.engines import Utterance

PIECES = 10
"""Pieces of a streamed utterance; a whole one cannot be interrupted, like a kernel on a GPU."""


class Simulated:
    """Sleeps TTS_SIMULATED_SECONDS (default 1) per utterance and gives a tone of the same length.

    Loading takes TTS_SIMULATED_LOAD_SECONDS (default 0). While the folder TTS_SIMULATED_FAULTS (default none) has a
    file named like the card, every utterance fails at once, as on a card that has fallen off the bus.
    """

    sample_rate = 16000

    def __init__(self) -> None:
        """Sleep as a model would load."""
        self.seconds = float(os.environ.get("TTS_SIMULATED_SECONDS", "1"))
        faults = os.environ.get("TTS_SIMULATED_FAULTS")
        self.fault = Path(faults, os.environ.get("CUDA_VISIBLE_DEVICES", "")) if faults else None
        time.sleep(float(os.environ.get("TTS_SIMULATED_LOAD_SECONDS", "0")))

    def speak(self, utterance: Utterance) -> Iterator[bytes]:
        """Give the tone, in equal pieces when streamed."""
        if self.fault and self.fault.exists():
            raise RuntimeError(f"CUDA error: {self.fault} says that the simulated GPU has a fault")
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

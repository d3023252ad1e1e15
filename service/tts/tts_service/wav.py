"""RIFF/WAVE of mono PCM with 16 bits per sample."""

import struct

BYTES_PER_SAMPLE = 2

UNKNOWN_LENGTH = 0xFFFFFFFF
"""Size in both length fields of a stream whose end is not known yet; players read such a file to its end."""

HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
"""RIFF, size, WAVE, then a fmt chunk of 16 bytes, then the head of the data chunk: 44 bytes."""


def wav_header(sample_rate: int, data_bytes: int | None = None) -> bytes:
    """The 44 bytes before `data_bytes` bytes of PCM at `sample_rate` Hz; None for a stream."""
    riff, data = (UNKNOWN_LENGTH,) * 2 if data_bytes is None else (HEADER.size - 8 + data_bytes, data_bytes)
    byte_rate = sample_rate * BYTES_PER_SAMPLE
    bits = BYTES_PER_SAMPLE * 8
    return HEADER.pack(
        b"RIFF", riff, b"WAVE", b"fmt ", 16, 1, 1, sample_rate, byte_rate, BYTES_PER_SAMPLE, bits, b"data", data
    )

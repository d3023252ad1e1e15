"""espeak-ng: a small speech synthesizer that needs no GPU."""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Iterator

from tts_service.engines import UnknownVoice, Utterance
from tts_service.wav import HEADER

WORDS_PER_MINUTE = 175
"""espeak-ng's own pace."""

CHUNK_BYTES = 8192

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Chinese characters, all blocks."""


class Espeak:
    """Speaks with the program espeak-ng, one process per utterance."""

    def __init__(self) -> None:
        """Ask espeak-ng for its voices and its sample rate; fails where it is not installed."""
        listing = subprocess.run(["espeak-ng", "--voices"], check=True, capture_output=True, text=True).stdout
        # Columns: priority, language, age/gender, name, ...; a voice is chosen by its language.
        self.voices = {line.split()[1] for line in listing.splitlines()[1:]}
        sample = subprocess.run(["espeak-ng", "--stdout", "a"], check=True, capture_output=True).stdout
        self.sample_rate: int = HEADER.unpack_from(sample)[7]

    def speak(self, utterance: Utterance) -> Iterator[bytes]:
        """Give the speech while espeak-ng produces it; closing the generator ends the process."""
        voice = utterance.voice or ("cmn" if HAN.search(utterance.text) else "en-us")
        if voice not in self.voices:
            raise UnknownVoice(voice)
        speed = str(round(WORDS_PER_MINUTE * utterance.speed))
        command = ["espeak-ng", "--stdin", "--stdout", "-b", "1", "-v", voice, "-s", speed]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin and isinstance(process.stdout, io.BufferedReader)
            try:
                # espeak-ng reads all of its input before it speaks, so this cannot wait for the output to be read.
                process.stdin.write(utterance.text.encode())
                process.stdin.close()
                process.stdout.read(HEADER.size)
                while chunk := process.stdout.read1(CHUNK_BYTES):
                    yield chunk
                if process.wait() != 0:
                    raise RuntimeError(f"espeak-ng ended with {process.returncode}")
            finally:
                process.kill()

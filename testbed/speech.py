"""Asking the speech service for audio, and telling speech from an empty file."""

import array
import io
import sys
import wave

import httpx

ROUTE_TO_SPEECH = "audio-generate"
# Of 32767. espeak-ng speaks at about 20,000; rounding noise stays below 10.
AUDIBLE = 1000


class NotSpeech(ValueError):
    """What came back is no audible audio; the message says what it is."""


def speak(service: str, text: str) -> bytes:
    """Have the service at URL `service` (which ends with /) speak `text`; return the WAV."""
    # A proxy in the environment is for the world outside, not for a test host.
    with httpx.Client(trust_env=False, timeout=60) as client:
        answer = client.post(f"{service}{ROUTE_TO_SPEECH}", json={"text": text})
    if answer.status_code != httpx.codes.OK:
        raise NotSpeech(f"{answer.status_code} from {answer.url}: {answer.text[:500]}")
    return answer.content


def seconds_of_speech(content: bytes) -> float:
    """Return how long a 16-bit RIFF/WAVE plays; raise NotSpeech where it is none, or is silent."""
    try:
        with wave.open(io.BytesIO(content)) as audio:
            if audio.getsampwidth() != 2:
                raise NotSpeech(f"samples of {audio.getsampwidth()} bytes; 2 expected")
            seconds = audio.getnframes() / audio.getframerate()
            samples = array.array("h", audio.readframes(audio.getnframes()))
    except (wave.Error, EOFError) as error:
        raise NotSpeech(f"no RIFF/WAVE: {error}; it begins with {content[:20]!r}") from error
    if sys.byteorder == "big":
        samples.byteswap()
    peak = max((abs(sample) for sample in samples), default=0)
    if peak < AUDIBLE:
        raise NotSpeech(f"{seconds:.1f} s of silence: the loudest sample is {peak} of 32767")
    return seconds

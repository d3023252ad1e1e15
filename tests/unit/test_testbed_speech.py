import array
import io
import wave

import pytest

from testbed.speech import NotSpeech, seconds_of_speech


def recording(samples: list[int], width: int = 2, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(width)
        audio.setframerate(rate)
        audio.writeframes(array.array("h" if width == 2 else "b", samples).tobytes())
    return buffer.getvalue()


def test_sound_has_a_length() -> None:
    assert seconds_of_speech(recording([0, 20000, -20000, 0] * 1000)) == 0.5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(recording([3, -4] * 4000), "silence", id="silence"),
        pytest.param(recording([]), "silence", id="nothing but a header"),
        pytest.param(recording([100] * 10, width=1), "samples of 1 bytes", id="8 bit"),
        pytest.param(b'{"error": {}}', "no RIFF/WAVE", id="JSON"),
        pytest.param(b"", "no RIFF/WAVE", id="empty"),
    ],
)
def test_what_is_no_speech_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(NotSpeech, match=reason):
        seconds_of_speech(content)

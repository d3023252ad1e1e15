"""The reference service under the guard and Gunicorn, as it runs on a GPU host."""

import http.client
import io
import json
import wave

import pytest

from tests.unit.service_helpers import hang_up, read_ledger, read_until, running, serving, wait_for

ROUTE = "/AIVoice/TTS/CosyVoice2/audio-generate"


def body(**fields):
    return json.dumps({"text": "你好,世界", **fields}).encode()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    ledger = folder / "ledger"
    environment = {"TTS_ENGINE": "simulated", "TTS_SIMULATED_SECONDS": "1", "TTS_LEDGER": str(ledger)}
    with serving(folder, "tts_service.app:app", SLOT_GUARD_INSTANCE="tts-gpu01-0", **environment) as server:
        server.ledger = ledger
        yield server


@pytest.fixture
def server(simulated):
    wait_for(lambda: simulated.in_flight() == 0)
    simulated.ledger.write_text("")
    return simulated


def spoken(server):
    """Seconds of the only inference in the ledger, once the slot is free again."""
    wait_for(lambda: server.in_flight() == 0)
    start, end = read_ledger(server.ledger)
    assert start["instance"] == "tts-gpu01-0"
    return end["monotonic"] - start["monotonic"]


def test_a_sentence_is_spoken(tmp_path):
    with serving(tmp_path, "tts_service.app:app") as server:
        status, headers, audio = server.ask("POST", ROUTE, body(), {"Content-Type": "application/json"})
        assert (status, headers["Content-Type"]) == (200, "audio/wav")
        with wave.open(io.BytesIO(audio)) as file:
            assert file.getnframes() > 22050
        client = server.begin(ROUTE, body=body(stream=True))
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.headers["Transfer-Encoding"] == "chunked"
        assert answer.read()[44:] == audio[44:]


def test_a_stream_begins_before_it_ends(server):
    client = server.begin(ROUTE, body=body(stream=True))
    read_until(client, b"RIFF")
    assert running(server.ledger) == 1
    read_until(client, b"\r\n0\r\n\r\n")
    assert spoken(server) >= 1


def test_a_whole_utterance_is_finished_after_a_hang_up(server):
    client = server.begin(ROUTE, body=body())
    wait_for(lambda: running(server.ledger) == 1)
    hang_up(client)
    assert server.in_flight() == 1
    assert spoken(server) >= 1


def test_a_stream_is_stopped_after_a_hang_up(server):
    client = server.begin(ROUTE, body=body(stream=True))
    read_until(client, b"RIFF")
    hang_up(client)
    assert spoken(server) < 1


def test_a_crash_is_logged(tmp_path):
    (tmp_path / "broken_engine.py").write_text(
        "class Engine:\n    sample_rate = 8000\n    def speak(self, utterance):\n        raise MemoryError('no room')\n"
    )
    with serving(tmp_path, "tts_service.app:app", TTS_ENGINE="broken_engine:Engine") as server:
        answer = server.ask("POST", ROUTE, body(), {"Content-Type": "application/json"})
        assert answer[0] == 500
        wait_for(lambda: server.status()["failed"] == 1)
        assert server.log.count("MemoryError: no room") == 1

"""The reference TTS service, without a server: what it accepts, what it says, what it refuses."""

import asyncio
import gc
import io
import json
import struct
import subprocess
import threading
import time
import wave

import httpx
import pytest
from tts_service.engines import UnknownVoice, load_engine
from tts_service.engines.espeak import Espeak
from tts_service.engines.simulated import Simulated
from tts_service.ledger import Ledger
from tts_service.service import create_app
from tts_service.settings import DEFAULT_ROUTE, Settings
from tts_service.wav import HEADER, UNKNOWN_LENGTH, wav_header

from tests.unit.service_helpers import read_ledger

URL = f"{DEFAULT_ROUTE}audio-generate"


class Parrot:
    """An engine for tests: gives the text back, one piece per character, and keeps what it was asked."""

    sample_rate = 8000

    def __init__(self):
        self.utterances = []
        self.threads = set()

    def speak(self, utterance):
        self.utterances.append(utterance)
        self.threads.add(threading.current_thread())
        if utterance.voice:
            raise UnknownVoice(utterance.voice)
        if utterance.text == "crash":
            raise RuntimeError("CUDA out of memory")
        for character in utterance.text:
            yield character.encode()


@pytest.fixture
def parrot():
    return Parrot()


def post(app, body, url=URL, **headers):
    """POST `body` (bytes as they are, anything else as JSON) and return httpx's response."""

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with httpx.AsyncClient(transport=transport, base_url="http://gpu") as client:
            return await client.post(url, content=content, headers={"Content-Type": "application/json", **headers})

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def espeak():
    return Espeak()


@pytest.mark.parametrize("text", ["你好,世界", "Hello, world", "你好 world", "𠮷"])
def test_espeak_speaks(espeak, text):
    answer = post(create_app(Settings(), espeak), {"text": text})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/wav")
    assert int(answer.headers["content-length"]) == len(answer.content)
    with wave.open(io.BytesIO(answer.content)) as audio:
        assert (audio.getnchannels(), audio.getsampwidth(), audio.getframerate()) == (1, 2, 22050)
        samples = struct.unpack(f"<{audio.getnframes()}h", audio.readframes(audio.getnframes()))
    assert len(samples) > 22050 // 5
    assert max(samples) > 1000


def test_espeak_chooses_a_voice_by_the_text_and_obeys(espeak):
    app = create_app(Settings(), espeak)
    chosen = post(app, {"text": "你好"}).content
    assert chosen == post(app, {"text": "你好", "voice": "cmn"}).content
    assert chosen != post(app, {"text": "你好", "voice": "yue"}).content
    assert post(app, {"text": "hi"}).content == post(app, {"text": "hi", "voice": "en-us"}).content
    assert len(post(app, {"text": "你好", "speed": 2}).content) < len(chosen)


def test_espeak_knows_its_voices(espeak):
    answer = post(create_app(Settings(), espeak), {"text": "hi", "voice": "-f/etc/passwd"})
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "voice")


def test_closing_espeaks_generator_ends_its_process(espeak, monkeypatch):
    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    app = create_app(Settings(max_characters=10**6), espeak)
    seen = []

    async def cut(text):
        sent = asyncio.Event()
        events = [{"type": "http.request", "body": json.dumps({"text": text, "stream": True}).encode()}]

        async def receive():
            if events:
                return events.pop()
            await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            seen.append(message)
            if message.get("body"):
                sent.set()

        scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": []}
        scope["headers"] = [(b"content-type", b"application/json")]
        await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.4"}}, receive, send)

    asyncio.run(cut("a long story. " * 5000))
    (process,) = processes
    assert process.returncode == -9
    assert sum(len(message.get("body", b"")) for message in seen) < 1_000_000


def test_a_stream_declares_an_unknown_length(parrot):
    answer = post(create_app(Settings(), parrot), {"text": "abcd", "stream": True})
    assert answer.status_code == 200
    assert "content-length" not in answer.headers
    header = HEADER.unpack(answer.content[:44])
    assert (header[0], header[1], header[7], header[-2], header[-1]) == (
        b"RIFF",
        UNKNOWN_LENGTH,
        8000,
        b"data",
        UNKNOWN_LENGTH,
    )
    assert answer.content[44:] == b"abcd"
    assert parrot.utterances[0].stream


def test_a_whole_answer_has_exact_lengths(parrot):
    content = post(create_app(Settings(), parrot), {"text": "abcd"}).content
    assert content == wav_header(8000, 4) + b"abcd"
    assert (content[4:8], content[40:44]) == (struct.pack("<I", 40), struct.pack("<I", 4))


def test_engines_run_outside_the_event_loop(parrot):
    for stream in (False, True):
        post(create_app(Settings(), parrot), {"text": "abcd", "stream": stream})
    assert threading.main_thread() not in parrot.threads


REFUSED = [
    (b"{bad", 400, "body", "json_invalid"),
    (b"\xff\xfe", 400, "body", "json_invalid"),
    (b"", 422, "body", "missing"),
    ([], 422, "body", None),
    ({}, 422, "text", "missing"),
    ({"text": ""}, 422, "text", "string_too_short"),
    ({"text": " \n\u3000"}, 422, "text", "blank"),
    ({"text": "长" * 11}, 422, "text", "string_too_long"),
    ({"text": "\ud800"}, 422, "text", "string_unicode"),
    ({"text": 5}, 422, "text", None),
    ({"text": None}, 422, "text", None),
    ({"text": "hi", "txet": "hi"}, 422, "txet", "extra_forbidden"),
    ({"text": "hi", "\ud800": 1}, 422, "body", None),
    ({"text": "hi", "stream": "yes"}, 422, "stream", None),
    ({"text": "hi", "speed": 3}, 422, "speed", None),
    ({"text": "hi", "speed": float("nan")}, 422, "speed", None),
    ({"text": "hi", "voice": "x" * 41}, 422, "voice", None),
    ({"text": "hi", "voice": "nobody"}, 422, "voice", "unknown_voice"),
    ({"text": "hi", "voice": "\ud800"}, 422, "voice", "string_unicode"),
    ({"text": "hi", "voice": "nobody", "stream": True}, 422, "voice", "unknown_voice"),
]


@pytest.mark.parametrize(("body", "status", "field", "code"), REFUSED)
def test_what_cannot_be_spoken_is_refused_by_name(parrot, body, status, field, code):
    answer = post(create_app(Settings(max_characters=10), parrot), body)
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (status, field)
    assert code in (None, error["code"])
    assert set(error) == {"code", "message", "type", "field", "timestamp"}
    assert " / " in error["message"]


def test_the_limit_counts_characters(parrot):
    assert post(create_app(Settings(max_characters=10), parrot), {"text": "长" * 10}).status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", URL, 405), ("POST", "/elsewhere", 404)])
def test_other_requests_get_json_too(parrot, method, path, status):
    async def ask():
        transport = httpx.ASGITransport(create_app(Settings(), parrot))
        async with httpx.AsyncClient(transport=transport, base_url="http://gpu") as client:
            return await client.request(method, path)

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request")
    assert "field" not in answer.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_crash_is_a_500(parrot, stream):
    answer = post(create_app(Settings(), parrot), {"text": "crash", "stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "CUDA" not in answer.text


def test_the_route_can_be_set(parrot):
    app = create_app(Settings.from_environment({"TTS_ROUTE": "/speech/"}), parrot)
    assert post(app, {"text": "hi"}, "/speech/audio-generate").status_code == 200
    assert post(app, {"text": "hi"}).status_code == 404


def test_settings_come_from_the_environment():
    environment = {
        "TTS_ENGINE": "simulated",
        "TTS_MAX_CHARACTERS": "5",
        "TTS_LEDGER": "/l",
        "SLOT_GUARD_INSTANCE": "tts-gpu01-0",
    }
    assert Settings.from_environment(environment) == Settings(DEFAULT_ROUTE, "simulated", 5, "/l", "tts-gpu01-0")
    assert Settings.from_environment({}) == Settings()
    assert Settings().engine == "espeak"


def test_engines_are_found_by_name():
    assert isinstance(load_engine("espeak"), Espeak)
    assert isinstance(load_engine(f"{__name__}:Parrot"), Parrot)
    with pytest.raises(ValueError, match="TTS_ENGINE is 'cosyvoice'"):
        load_engine("cosyvoice")


def test_the_simulated_engine_takes_its_time(monkeypatch):
    monkeypatch.setenv("TTS_SIMULATED_SECONDS", "0.2")
    monkeypatch.setenv("TTS_SIMULATED_LOAD_SECONDS", "0.1")
    begun = time.monotonic()
    engine = load_engine("simulated")
    assert isinstance(engine, Simulated)
    assert time.monotonic() - begun >= 0.1
    for stream in (False, True):
        begun = time.monotonic()
        answer = post(create_app(Settings(), engine), {"text": "hi", "stream": stream})
        assert 0.2 <= time.monotonic() - begun < 0.4
        assert len(answer.content) == 44 + 2 * 16000 // 5


def test_a_simulated_card_fails_while_it_has_a_fault(monkeypatch, tmp_path):
    monkeypatch.setenv("TTS_SIMULATED_SECONDS", "0")
    monkeypatch.setenv("TTS_SIMULATED_FAULTS", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    app = create_app(Settings(), load_engine("simulated"))
    for fault, status in (("0", 200), ("1", 500)):
        (tmp_path / fault).touch()
        assert post(app, {"text": "hi"}).status_code == status
    (tmp_path / "1").unlink()
    assert post(app, {"text": "hi"}).status_code == 200


def test_a_garbage_collection_amid_a_record_may_record_the_end_of_an_abandoned_inference(tmp_path, monkeypatch):
    """So it is where a server cancels requests; without the guard that is, which lets them end."""
    ledger = Ledger(str(tmp_path / "ledger"), "tts-gpu01-0")

    def inference(request):
        with ledger.inference(request):
            yield

    def abandon(inference):
        next(inference)
        cycle = [inference]
        cycle.append(cycle)

    def collect_and_dump(line, dumps=json.dumps):
        gc.collect()
        return dumps(line)

    abandon(inference("abandoned"))
    monkeypatch.setattr(json, "dumps", collect_and_dump)
    thread = threading.Thread(target=next, args=[inference("next")], daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    seen = {(line["event"], line["request"]) for line in read_ledger(tmp_path / "ledger")}
    assert {("end", "abandoned"), ("start", "next")} <= seen


def test_the_ledger_sees_every_inference(parrot, tmp_path):
    ledger = tmp_path / "ledger"
    app = create_app(Settings(ledger=str(ledger), instance="tts-gpu01-0"), parrot)
    for text in ("hi", "crash", " "):
        post(app, {"text": text}, **{"X-Request-ID": text})
    lines = read_ledger(ledger)
    seen = [(line["event"], line["request"], line["running"]) for line in lines]
    assert seen == [("start", "hi", 1), ("end", "hi", 0), ("start", "crash", 1), ("end", "crash", 0)]
    assert {line["instance"] for line in lines} == {"tts-gpu01-0"}
    assert lines[0]["wall"] <= lines[1]["wall"]
    assert lines[0]["monotonic"] <= lines[1]["monotonic"]

"""The guard under a real Gunicorn, with clients that hang up."""

import http.client
import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.service_helpers import FROM_GATEWAY, hang_up, read_ledger, read_until, running, serving, wait_for

ARTICLE_ROUTE = "/AIVoice/TTS/CosyVoice2/audio-generate"
WHOLE = ["/sync", "/thread", "/coroutine", "/body"]
STREAMED = ["/stream", "/astream"]


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def kinds(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("kinds")
    ledger = folder / "ledger"
    environment = {"SLOT_GUARD_INSTANCE": "gpu-0", "SLOT_GUARD_VERSION": "v1", "WORK_LEDGER": str(ledger)}
    with serving(folder, "kinds:layered", "--keep-alive", "75", "--asgi-loop", request.param, **environment) as server:
        server.ledger = ledger
        yield server


@pytest.fixture
def server(kinds):
    """The server of all kinds of work, at rest, with an empty ledger."""
    wait_for(lambda: kinds.in_flight() == 0 and running(kinds.ledger) == 0)
    kinds.ledger.write_text("")
    return kinds


def assert_held_while_running(server):
    """While the ledger shows work, so does the guard; soon after its end the slot is free."""
    while before := running(server.ledger):
        in_flight = server.in_flight()
        assert running(server.ledger) < before or in_flight >= before
    assert wait_for(lambda: server.in_flight() == 0, 0.5)


@pytest.mark.parametrize("path", [*WHOLE, *STREAMED])
def test_a_third_request_is_refused_at_once(server, path):
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.post, path) for _ in range(2)]
        wait_for(lambda: running(server.ledger) == 2)
        begun = time.monotonic()
        status, headers, body = server.ask("POST", path, headers={"X-Request-ID": "third", **FROM_GATEWAY})
        assert time.monotonic() - begun < 0.15
        assert [answer.result()[0] for answer in answers] == [200, 200]
    assert (status, headers["X-Slot-Guard"], headers["Retry-After"]) == (429, "full", "1")
    assert json.loads(body)["error"].keys() == {"code", "message", "type", "timestamp"}
    assert max(line["running"] for line in read_ledger(server.ledger)) == 2
    assert not any(line["request"] == "third" for line in read_ledger(server.ledger))


@pytest.mark.parametrize("path", [*WHOLE, *STREAMED])
def test_a_client_that_hangs_up_leaves_its_slot_held(server, path):
    client = server.begin(path)
    wait_for(lambda: running(server.ledger) == 1)
    time.sleep(0.15)
    hang_up(client)
    assert_held_while_running(server)
    start, end = read_ledger(server.ledger)
    assert end["monotonic"] - start["monotonic"] > 0.59


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_cut_after_its_first_piece_holds_its_slot_to_its_end(server, path):
    client = server.begin(path)
    read_until(client, b"piece")
    hang_up(client)
    assert_held_while_running(server)
    start, end = read_ledger(server.ledger)
    assert end["monotonic"] - start["monotonic"] > 0.59


def test_a_client_that_hangs_up_in_mid_upload_frees_its_slot(server):
    client = server.begin("/body", body=b"half", length=8)
    wait_for(lambda: server.in_flight() == 1)
    hang_up(client)
    wait_for(lambda: server.in_flight() == 0, 0.5)
    assert read_ledger(server.ledger) == []


def test_a_slow_reader_that_hangs_up_frees_its_slot(server):
    client = server.begin("/flood")
    wait_for(lambda: server.in_flight() == 1)
    time.sleep(0.3)
    hang_up(client)
    wait_for(lambda: server.in_flight() == 0, 0.5)


def test_a_thread_that_its_request_gave_up_holds_the_slot(server):
    assert server.post("/abandoned")[0] == 504
    assert running(server.ledger) == 1
    assert_held_while_running(server)


def test_background_work_holds_the_slot_after_the_answer(server):
    assert server.post("/background")[0] == 200
    wait_for(lambda: running(server.ledger) == 1)
    assert_held_while_running(server)


def test_twelve_hang_ups_never_let_a_third_request_work(server):
    for wave in range(6):
        clients = [server.begin(f"/{kind}", f"{wave}-{kind}") for kind in ("thread", "sync")]
        time.sleep(0.1)
        for client in clients:
            hang_up(client)
    assert_held_while_running(server)
    events = read_ledger(server.ledger)
    assert max(line["running"] for line in events) == 2
    assert len({line["request"] for line in events}) < 12


def test_the_next_request_of_a_client_is_never_refused_falsely(server):
    refused = server.status()["refused"]
    connections = [server.connection() for _ in range(2)]

    def converse(connection):
        statuses = set()
        for _ in range(200):
            connection.request("POST", "/quick")
            answer = connection.getresponse()
            answer.read()
            statuses.add(answer.status)
        connection.close()
        return statuses

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(converse, connections)) == [{200}, {200}]
    assert server.status()["refused"] == refused


def test_a_large_body_is_refused_without_a_reset_and_its_connection_lives_on(server):
    work = [server.begin("/thread") for _ in range(2)]
    wait_for(lambda: server.in_flight() == 2)
    connection = server.connection()
    for _ in range(2):
        connection.request("POST", "/body", bytes(20_000_000), FROM_GATEWAY)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["X-Slot-Guard"]) == (429, "full")
        assert json.loads(answer.read())["error"]["code"] == "slots_full"
    connection.close()
    for client in work:
        assert client.recv(12) == b"HTTP/1.1 200"


def test_a_failure_is_logged_and_counted(server):
    failed = server.status()["failed"]
    assert server.post("/raise")[0] == 500
    wait_for(lambda: server.status()["failed"] == failed + 1)
    assert "RuntimeError: CUDA out of memory" in server.log


def web_socket(server):
    return server.send(
        b"GET /echo HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )


def test_web_sockets_hold_slots_until_they_are_cut(server):
    clients = [web_socket(server) for _ in range(2)]
    for client in clients:
        assert client.recv(12) == b"HTTP/1.1 101"
    assert web_socket(server).recv(12) == b"HTTP/1.1 403"
    assert server.in_flight() == 2
    for client in clients:
        hang_up(client)
    wait_for(lambda: server.in_flight() == 0, 0.5)


def test_admin_answers_are_for_direct_requests_only(server):
    for path in ("live", "ready", "status", "metrics", "nothing", "status/live", ""):
        assert server.ask("GET", f"/_slot_guard/{path}", headers=FROM_GATEWAY)[0] == 404
    assert server.ask("GET", "/_slot_guard/status/live")[0] == 404
    assert server.ask("GET", "/_slot_guard")[0] == 404
    assert server.ask("GET", "/%5Fslot_guard/status", headers=FROM_GATEWAY)[0] == 404


def test_metrics_are_prometheus_text(server):
    _, headers, body = server.ask("GET", "/_slot_guard/metrics")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    sample = re.compile(r'(slot_guard_[a-z_]+)\{instance="gpu-0",version="v1"(,outcome="[a-z]+")?\} [0-9.e+]+')
    declared = set()
    for line in body.decode().splitlines():
        if line.startswith("# TYPE "):
            declared.add(line.split()[2])
        elif not line.startswith("# HELP "):
            assert sample.fullmatch(line), line
            assert sample.fullmatch(line)[1] in declared
    status = server.status()
    assert f'outcome="refused"}} {status["refused"]}\n' in body.decode()


def test_the_articles_app_loads_blocks_and_is_named(tmp_path):
    with serving(tmp_path, "App_Http_Server:app", wait=lambda server: server.is_up()) as server:
        status, headers, body = server.post(ARTICLE_ROUTE)
        assert (status, headers["X-Slot-Guard"], headers["Retry-After"]) == (503, "loading", "5")
        assert json.loads(body)["error"]["code"] == "loading"
        assert server.ask("POST", ARTICLE_ROUTE, headers=FROM_GATEWAY)[0] == 429
        status, _, body = server.ask("GET", "/_slot_guard/ready")
        assert (status, json.loads(body)["state"]) == (503, "loading")
        wait_for(server.is_ready)
        assert "BLOCKS" not in server.log
        for _ in range(3):
            status, _, body = server.post(ARTICLE_ROUTE)
            assert (status, json.loads(body)["message"]) == (200, "成功")
        assert server.log.count("App_Http_Server:app BLOCKS ITS EVENT LOOP") == 1
        assert "time.sleep(1)" in server.log
        blocked = server.status()["loop_blocked"]
        assert 1 <= blocked["count"] <= 3
        assert 0.8 < blocked["longest_seconds"] < 2
        assert "in audio_generate" in blocked["stack"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no weights')", "RuntimeError: no weights"),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
        ("app = 5", "broken:app is a int"),
        (
            "async def app(_, __, send): await send({'type': 'lifespan.startup.failed', 'message': 'no GPU'})",
            "start-up failed: no GPU",
        ),
    ],
)
def test_an_app_that_cannot_be_loaded_ends_gunicorn_with_its_boot_error(tmp_path, source, said):
    (tmp_path / "broken.py").write_text(source)
    with serving(tmp_path, "broken:app", wait=None) as server:
        assert server.process.wait(10) == 3
        assert said in server.log
        assert "Traceback" in server.log
        assert "broken:app is failed" in server.log


@pytest.mark.parametrize("leaves", [False, True])
def test_a_graceful_stop_lets_running_work_finish(tmp_path, leaves):
    ledger = tmp_path / "ledger"
    with serving(tmp_path, "kinds:app", WORK_LEDGER=str(ledger), WORK_SECONDS="2") as server:
        assert json.loads(server.ask("GET", "/state")[2]) == "hello"
        client = server.begin("/thread")
        wait_for(lambda: running(ledger) == 1)
        if leaves:
            hang_up(client)
        server.process.send_signal(signal.SIGTERM)
        if not leaves:
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert (answer.status, answer.read()) == (200, b'{"done":true}')
        assert server.process.wait(10) == 0
    assert [line["event"] for line in read_ledger(ledger)] == ["start", "end", "shutdown"]


def test_a_stop_does_not_wait_for_a_model_that_loads(tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    with serving(tmp_path, "slow:app", wait=lambda server: server.is_up()) as server:
        begun = time.monotonic()
        server.process.terminate()
        assert server.process.wait(10) == 0
        assert time.monotonic() - begun < 3


def test_wrong_settings_end_gunicorn_with_its_boot_error(tmp_path):
    with serving(tmp_path, "kinds:app", wait=None, SLOT_GUARD_SLOTS="0") as server:
        assert server.process.wait(10) == 3
        assert "SLOT_GUARD_SLOTS is '0'" in server.log


def test_an_apps_own_429_is_no_refusal_to_the_gateway(server):
    """The gateway would run the request on every other GPU as well."""
    failed = server.status()["failed"]
    direct = server.ask("POST", "/quota")
    assert (direct[0], direct[2]) == (429, b"monthly quota used up")
    status, headers, body = server.ask("POST", "/quota", headers={"X-Gpufleet-Instance": "x"})
    assert (status, headers["X-Own"], headers["X-Slot-Guard"]) == (503, "yes", "app-429")
    assert body == b"monthly quota used up"
    assert server.status()["failed"] == failed


@pytest.mark.parametrize("own_format", [{}, {"OWN_FORMAT": "%(name)s says %(message)s for %(request_id)s"}])
def test_each_line_in_the_log_says_for_which_request_it_is(tmp_path, own_format):
    """Also of two at a time, and also where the app sets up logging itself; before and after requests none is named."""
    with serving(tmp_path, "talkative:app", SLOT_GUARD_FAILURES="2", **own_format) as server:
        ids = ["a1b2", "c3d4"]
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(server.post, "/", name) for name in ids]
            assert [answer.result()[0] for answer in answers] == [500, 500]
        wait_for(lambda: "failed in a row" in server.log)
        lines = server.log.splitlines()
        said = "talkative says {} for {}" if own_format else "talkative: {} request_id={}"
        for name in ids:
            for text in ("in the loop", "in a thread"):
                assert [line for line in lines if line.endswith(said.format(text, name))], text
            assert [
                line for line in lines if line.endswith(f"gunicorn.error: Error in ASGI application request_id={name}")
            ]
        (taken_out,) = [line for line in lines if "failed in a row" in line]
        assert re.search(r"slot_guard: 2 failed in a row, .* request_id=(a1b2|c3d4)$", taken_out)
        assert [line for line in lines if line.endswith("slot_guard: loading talkative:app, 2 slots")]

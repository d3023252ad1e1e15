"""What clients can do to the gateway: pose as others, send too much, send too slowly. And what a scanner says of it."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.templates.conftest import KEYS, PORT, ROUTE, TLS, article_fleet, running
from tests.templates.render import render
from tests.templates.test_gateway import statuses

#: HSTS would bind every other port of the gateway's name to TLS too, in browsers; what asks this one is none.
GIXY = (Path(sys.executable).with_name("gixy"), "--format", "json", "--skips", "hsts_header")

HEAD = b"POST %sgenerate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % ROUTE.encode()


def findings(configuration, folder):
    (folder / "nginx.conf").write_text(configuration)
    scanned = subprocess.run([*GIXY, folder / "nginx.conf"], capture_output=True, text=True)
    return [finding["plugin"] for finding in json.loads(scanned.stdout)]


OPTIONS = {
    "plain": ({}, {}),
    "every option": (
        {**TLS, "api_keys": KEYS},
        {
            "gateway_trusted_proxies": ["10.0.0.0/8"],
            "gateway_status_clients": ["10.0.0.0/8"],
            "gateway_log_format": "json",
        },
    ),
}


def rendered(options, **service):
    """What nginx reads, with the keys in the place where it includes them."""
    entrance, variables = OPTIONS[options]
    fleet = article_fleet(entrance=entrance, **service)
    if options == "every option":
        fleet["monitoring"] = [{"host": "watcher", "address": "10.0.0.9"}, {"host": "other", "address": "[fd00::9]"}]
    keys = render("gateway", "api_keys.conf.j2", fleet)
    return render("gateway", "nginx.conf.j2", fleet, **variables).replace("include @SECRETS@/api_keys.conf;", keys)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("route", [ROUTE, "/"])
def test_a_scanner_finds_nothing(tmp_path, options, route):
    assert findings(rendered(options, route=route), tmp_path) == []


def test_the_scanner_finds_what_is_wrong(tmp_path):
    text = rendered("every option")
    assert "host_spoofing" in findings(text.replace("Host $host$asked_port;", "Host $http_host;"), tmp_path)
    assert "weak_ssl_tls" in findings(text.replace("TLSv1.2 TLSv1.3", "TLSv1 TLSv1.2"), tmp_path)


async def ask_as(cluster, *forwarded, client="127.0.0.10"):
    """Ask three times at once under other names, by TLS as it says; return how many are served."""
    headers = [*[("X-Forwarded-For", value) for value in forwarded], ("X-Real-IP", "9.9.9.9")]
    headers.append(("X-Forwarded-Proto", "https"))
    answers = await asyncio.gather(*(cluster.post(client=client, headers=headers) for _ in range(3)))
    return statuses(answers)[200]


FORGERIES = [
    ("8.8.8.8",),
    ("8.8.8.8, 127.0.0.1",),
    ("127.0.0.99",),
    ("8.8.8.8", "7.7.7.7"),
    ("127.0.0.99", "8.8.8.8, 127.0.0.99"),
]


@pytest.mark.parametrize("trusted", [[], ["127.0.0.99"]], ids=["no proxy", "another proxy"])
def test_a_client_cannot_pose_as_others_to_get_more_than_its_limit(gateway, trusted):
    async def scenario():
        fleet = article_fleet(client_limit=1)
        async with running(gateway, fleet, gateway_trusted_proxies=trusted) as cluster:
            for forwarded in FORGERIES:
                assert await ask_as(cluster, *forwarded) == 1
                (gpu,) = [gpu for gpu in cluster.gpus.values() if gpu.started]
                assert gpu.headers["x-real-ip"] == gpu.headers["x-forwarded-for"] == "127.0.0.10"
                assert gpu.headers["x-forwarded-proto"] == "http"
                gpu.started = 0
            bursts = [ask_as(cluster, f"8.8.8.{number}") for number in range(4)]
            assert sum(await asyncio.gather(*bursts)) == 1, "one client, whatever it calls itself"
            assert all(line.startswith("127.0.0.10 ") for line in gateway.log())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("forwarded", "true"),
    [
        (("1.1.1.1",), "1.1.1.1"),
        (("8.8.8.8, 1.1.1.1",), "1.1.1.1"),
        (("8.8.8.8", "1.1.1.1"), "1.1.1.1"),
        (("8.8.8.8, 1.1.1.1, 127.0.0.98",), "1.1.1.1"),
        (("1.1.1.1", "127.0.0.98"), "1.1.1.1"),
        (("not an address",), "127.0.0.99"),
        ((), "127.0.0.99"),
    ],
)
def test_behind_a_trusted_proxy_the_client_is_the_last_address_that_no_proxy_has(gateway, forwarded, true):
    """What a client writes itself stands in front of what its proxy adds, so it is not believed."""

    async def scenario():
        fleet, proxies = article_fleet(client_limit=1), ["127.0.0.98/31"]
        async with running(gateway, fleet, gateway_trusted_proxies=proxies) as cluster:
            assert await ask_as(cluster, *forwarded, client="127.0.0.99") == 1
            (gpu,) = [gpu for gpu in cluster.gpus.values() if gpu.started]
            assert gpu.headers["x-real-ip"] == gpu.headers["x-forwarded-for"] == true
            assert gpu.headers["x-forwarded-proto"] == ("http" if true == "127.0.0.99" else "https")
            others = [ask_as(cluster, f"8.8.8.8, 1.1.1.{number}", client="127.0.0.99") for number in range(2, 5)]
            assert await asyncio.gather(*others) == [1, 1, 1], "each behind the proxy has its own limit"

    asyncio.run(scenario())


def test_the_status_page_is_for_whom_the_operator_names(gateway):
    async def scenario():
        async with running(gateway, article_fleet(), gateway_status_clients=["127.0.0.64/26"]) as cluster:
            cluster.gpus["cosyvoice2-gpu01-0"].state = "loading"
            await gateway.start_agent()
            assert "instances" in (await cluster.ask("/cluster/status", "127.0.0.70")).json()
            for path in ("/cluster/status", "//cluster/status", "/x/%2e%2e/cluster/status"):
                answer = await cluster.ask(path, "127.0.0.10")
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
            assert (await cluster.ask("/health", "127.0.0.10")).status_code == 200

    asyncio.run(scenario())


async def dawdle(*pieces, pause=0.2):
    """Send pieces with a pause behind each, as long as the gateway takes them; return the answer and the seconds."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    received = b""
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        received = await reader.read()
    except ConnectionError:
        pass
    finally:
        writer.close()
    return received, time.monotonic() - began


def test_who_never_ends_its_header_or_its_body_is_dropped_and_held_no_gpu(gateway):
    """Each piece comes in time; it is the whole header that must."""

    async def scenario():
        async with running(gateway, article_fleet(), gateway_client_timeout_seconds=1) as cluster:
            dropped = await asyncio.gather(
                dawdle(),
                dawdle(b"POST"),
                dawdle(HEAD),
                dawdle(HEAD, *[b"X: y\r\n"] * 20),
                dawdle(HEAD + b"Content-Length: 5\r\n\r\n", b"a"),
                dawdle(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\na"),
            )
            for received, seconds in dropped:
                assert received == b""
                assert 0.9 < seconds < 2.5
            assert cluster.started == 0
            received, seconds = await dawdle(HEAD + b"Content-Length: 8\r\n\r\n", *[b"x"] * 8)
            assert received.startswith(b"HTTP/1.1 200 ") and seconds > 1.6, "slow, and in time at each step"
            assert cluster.started == 1

    asyncio.run(scenario())


def test_who_takes_no_answer_is_dropped_and_frees_its_gpu(gateway):
    async def scenario():
        fleet = article_fleet(hosts=1, gpu_count=1, slots=1, client_limit=1)
        async with running(gateway, fleet, gateway_client_timeout_seconds=1) as cluster:
            (gpu,) = cluster.gpus.values()
            head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nX-Accel-Buffering: no\r\n\r\n"
            gpu.stream, gpu.seconds = [head, bytes(30_000_000)], 0
            _, writer = await asyncio.open_connection("127.0.0.1", PORT)
            writer.transport.pause_reading()
            writer.write(HEAD + b"Content-Length: 2\r\n\r\n{}")
            await asyncio.sleep(0.5)
            assert statuses([await cluster.post(client="127.0.0.50")]) == {503: 1}, "its stream holds the only slot"
            await asyncio.sleep(2)
            gpu.stream = []
            assert statuses([await cluster.post(client="127.0.0.50")]) == {200: 1}
            writer.transport.abort()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (HEAD.replace(b"generate", b"g" * 7_000) + b"Content-Length: 0\r\n\r\n", 200),
        (HEAD.replace(b"generate", b"g" * 9_000) + b"Content-Length: 0\r\n\r\n", 414),
        (HEAD + b"Content-Length: 0\r\nX: %s\r\n\r\n" % (b"x" * 7_000), 200),
        (HEAD + b"Content-Length: 0\r\nX: %s\r\n\r\n" % (b"x" * 9_000), 431),
        (HEAD + b"Content-Length: 0\r\n%s\r\n" % (b"X: %s\r\n" % (b"x" * 1_000) * 40), 431),
    ],
    ids=["long path", "too long path", "long header", "too long header", "too many headers"],
)
def test_a_header_may_be_so_large_and_no_larger(gateway, head, status):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            received, _ = await dawdle(head, pause=0)
            head_of_answer, _, body = received.partition(b"\r\n\r\n")
            assert head_of_answer.startswith(b"HTTP/1.1 %d " % status)
            assert cluster.started == (status == 200)
            if status != 200:
                assert set(json.loads(body)["error"]) == {"code", "message", "type", "timestamp"}

    asyncio.run(scenario())


@pytest.mark.parametrize("line", [b"", b"x", b"GET", b"GET / HTTP/1.1 x", b"\0", b"\x16\x03\x01", b"GET x HTTP/1.1"])
def test_even_who_speaks_no_http_is_answered_in_json(gateway, line):
    async def scenario():
        async with running(gateway, article_fleet()):
            received, _ = await dawdle(line + b"\r\nHost: x\r\n\r\n", pause=0)
            head_of_answer, _, body = received.partition(b"\r\n\r\n")
            assert b"400 Bad Request" in head_of_answer or not head_of_answer.startswith(b"HTTP")
            assert json.loads(body or head_of_answer)["error"]["code"] == "bad_request"

    asyncio.run(scenario())

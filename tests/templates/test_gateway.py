"""The rendered gateway on loopback: what nginx accepts, and what it does under load and faults."""

import asyncio
import collections
import re
import time

import httpx
import pytest
from ansible_collections.gpufleet.core.plugins.modules.nginx_config import has_old_workers, leaving_servers

from tests.templates.conftest import KEYS, PORT, ROUTE, TLS, article_fleet, running

BUSY = "Over the concurrency limit, please retry later / 超出并发限制,服务器过载,请稍后重试"


def statuses(answers):
    return collections.Counter(answer.status_code for answer in answers if answer is not None)


@pytest.mark.parametrize("hosts", [1, 3, 300])
def test_nginx_accepts_any_size(gateway, hosts):
    gateway.write(article_fleet(hosts=hosts, client_limit=1))
    checked = gateway.command("-t")
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr and "[alert]" not in checked.stderr


def test_nginx_accepts_every_option(gateway, certificate):
    gateway.write(
        article_fleet(route="/", queue=2, entrance={**TLS, "api_keys": KEYS, "fleet_address": "fd00::64"}),
        certificate,
        gateway_log_format="json",
        gateway_trusted_proxies=["10.0.0.0/8", "192.168.1.1"],
        gateway_worker_processes="4",
    )
    checked = gateway.command("-t")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("workers", ["1", "4"])
def test_a_burst_fills_every_slot_and_no_more(gateway, workers):
    async def scenario():
        async with running(gateway, article_fleet(), gateway_worker_processes=workers) as cluster:
            started = time.monotonic()
            answers = await cluster.burst(20)
            refused = [answer for answer in answers if answer.status_code == 503]
            assert statuses(answers) == {200: 12, 503: 8}
            assert [gpu.peak for gpu in cluster.gpus.values()] == [2] * 6
            assert {answer.headers["retry-after"] for answer in refused} == {"1"}
            assert {answer.headers["content-type"] for answer in refused} == {"application/json"}
            assert refused[0].json()["error"]["message"] == BUSY
            assert time.monotonic() - started < 2
            assert statuses(await cluster.burst(20)) == {200: 12, 503: 8}, "every slot is free again"

    asyncio.run(scenario())


def test_one_client_gets_its_limit(gateway):
    async def scenario():
        async with running(gateway, article_fleet(), gateway_worker_processes="4") as cluster:
            assert statuses(await cluster.burst(20, clients=1)) == {200: 6, 503: 14}
            assert cluster.started == 6
            # In the service's own log, where its metrics are counted.
            assert sum(" 503 " in line for line in await gateway.logged(20)) == 14

    asyncio.run(scenario())


@pytest.mark.parametrize("workers", ["1", "4"])
def test_a_reload_admits_nothing_more(gateway, workers):
    async def scenario():
        async with running(gateway, article_fleet(), gateway_worker_processes=workers) as cluster:
            for gpu in cluster.gpus.values():
                gpu.seconds = 1.5
            first = asyncio.create_task(cluster.burst(12))
            await asyncio.sleep(0.4)
            gateway.reload()
            await asyncio.sleep(0.4)
            second = await cluster.burst(12, clients=8)
            assert statuses(second) == {503: 12}
            assert statuses(await first) == {200: 12}
            assert cluster.peak == 2

    asyncio.run(scenario())


def test_a_host_that_leaves_costs_nobody_his_request(gateway):
    async def slow_body():
        for _ in range(12):
            yield b" "
            await asyncio.sleep(0.25)

    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            before, over, seen = gateway.configuration.read_text(), asyncio.Event(), []

            async def client(number):
                while not over.is_set():
                    seen.append(await cluster.post(client=f"127.0.0.{10 + number}"))

            for gpu in cluster.gpus.values():
                gpu.seconds = 0.02
            clients = [asyncio.create_task(client(number)) for number in range(8)]
            uploads = [cluster.post(client=f"127.0.0.{20 + number}", content=slow_body()) for number in range(6)]
            uploading = asyncio.gather(*uploads)
            await asyncio.sleep(0.5)
            gateway.write(article_fleet(hosts=2))
            leaving = gateway.folder / "run/gpufleet-gateway/leaving.conf"
            leaving.write_text(leaving_servers(before, gateway.configuration.read_text()))
            assert gateway.command("-t").stderr.count("[warn]") == 0
            gateway.reload()
            await asyncio.sleep(1)
            over.set()
            await asyncio.gather(*clients)
            assert statuses(seen) == {200: len(seen)}
            assert has_old_workers()
            # Each of them chooses its GPU only now, among those that its old worker knows.
            assert statuses(await uploading) == {200: 6}

    asyncio.run(scenario())


def test_a_hang_up_does_not_free_a_working_gpu(gateway):
    async def scenario():
        async with running(gateway, article_fleet(), gateway_worker_processes="4") as cluster:
            for gpu in cluster.gpus.values():
                gpu.seconds = 1.2
            assert await cluster.burst(12, timeout=0.3) == [None] * 12
            assert statuses(await cluster.burst(12, clients=8)) == {503: 12}
            await asyncio.sleep(1)
            assert statuses(await cluster.burst(12)) == {200: 12}
            assert cluster.peak == 2

    asyncio.run(scenario())


def test_a_drain_flag_keeps_an_instance_free(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            flag = cluster.gateway.drain("cosyvoice2-gpu02-1")
            assert statuses(await cluster.burst(12)) == {200: 10, 503: 2}
            assert cluster.gpus["cosyvoice2-gpu02-1"].started == 0
            flag.unlink()
            assert statuses(await cluster.burst(12)) == {200: 12}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "status", ["500 Internal Server Error", "502 Bad Gateway", "503 Busy", "504 Late", "404 No", "413 Big"]
)
def test_what_a_service_answers_reaches_the_client(gateway, status):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            answer = f"HTTP/1.1 {status}\r\nContent-Length: 6\r\nX-Own: yes\r\n\r\nmyself".encode()

            async def fail():
                return answer

            for gpu in cluster.gpus.values():
                gpu.answer = fail
            seen = await cluster.post()
            assert (seen.status_code, seen.text, seen.headers["x-own"]) == (int(status[:3]), "myself", "yes")
            assert cluster.started == 1

    asyncio.run(scenario())


def test_a_death_in_mid_work_is_told_and_not_repeated(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:

            async def die():
                await asyncio.sleep(0.1)
                raise ConnectionResetError

            for gpu in cluster.gpus.values():
                gpu.answer = die
            seen = await cluster.post()
            assert (seen.status_code, seen.json()["error"]["type"]) == (502, "gpu_failure")
            assert cluster.started == 1

    asyncio.run(scenario())


def test_the_time_limit_is_told_and_not_repeated(gateway):
    async def scenario():
        async with running(gateway, article_fleet(time_limit_seconds=1)) as cluster:
            for gpu in cluster.gpus.values():
                gpu.seconds = 2
            seen = await cluster.post()
            assert (seen.status_code, seen.json()["error"]["type"]) == (504, "gpu_timeout")
            assert cluster.started == 1
            await asyncio.sleep(1)

    asyncio.run(scenario())


def test_a_gpu_that_refuses_connections_costs_nobody_a_request(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            await cluster.gpus["cosyvoice2-gpu01-0"].stop()
            assert statuses(await cluster.burst(10)) == {200: 10}
            assert statuses(await cluster.burst(12)) == {200: 10, 503: 2}

    asyncio.run(scenario())


def test_a_guard_that_refuses_is_not_the_last_word(gateway):
    """A guard still holds slots of clients that hung up in mid-stream; its 429 sends the request elsewhere."""

    async def scenario():
        async with running(gateway, article_fleet()) as cluster:

            async def refuse():
                return b"HTTP/1.1 429 Too Many Requests\r\nX-Slot-Guard: full\r\nContent-Length: 0\r\n\r\n"

            for gpu in list(cluster.gpus.values())[:5]:
                gpu.answer = refuse
            assert statuses(await cluster.burst(2)) == {200: 2}
            assert statuses(await cluster.burst(6)) == {200: 2, 503: 4}

    asyncio.run(scenario())


@pytest.mark.parametrize("megabytes, status", [(90, 200), (101, 413)])
def test_large_bodies(gateway, megabytes, status):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            body = bytes(megabytes * 1_000_000 + (megabytes > 100) * 5_000_000)
            seen = await cluster.post(content=body)
            assert seen.status_code == status
            if status == 413:
                assert seen.json()["error"]["code"] == "payload_too_large"
            else:
                assert sum(sum(gpu.bodies) for gpu in cluster.gpus.values()) == len(body)

    asyncio.run(scenario())


def test_a_large_body_is_refused_cleanly_when_all_are_busy(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            for instance in cluster.gpus:
                cluster.gateway.drain(instance)
            answers = await cluster.burst(4, content=bytes(20_000_000))
            assert statuses(answers) == {503: 4}

    asyncio.run(scenario())


def test_a_slow_upload_holds_no_gpu(gateway):
    async def slow_body():
        for _ in range(10):
            yield b" "
            await asyncio.sleep(0.1)

    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            uploads = asyncio.gather(
                *(cluster.post(client=f"127.0.0.{n // 6 + 50}", content=slow_body()) for n in range(12))
            )
            await asyncio.sleep(0.3)
            assert cluster.started == 0
            assert statuses(await cluster.burst(12)) == {200: 12}
            assert statuses(await uploads) == {200: 12}

    asyncio.run(scenario())


def test_a_stream_is_not_held_back(gateway):
    """The guard marks streams with this header; both tiers must heed it."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nX-Accel-Buffering: no\r\n\r\n"

    async def first_byte():
        start = time.monotonic()
        async with httpx.AsyncClient(trust_env=False) as http:
            url = f"http://127.0.0.1:{PORT}/AIVoice/TTS/CosyVoice2/generate"
            async with http.stream("POST", url, content=b"{}") as answer:
                async for chunk in answer.aiter_raw():
                    return time.monotonic() - start, chunk

    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            for gpu in cluster.gpus.values():
                gpu.stream = [head + b"first", b"second"]
            seconds, chunk = await first_byte()
            assert chunk == b"first"
            assert seconds < 0.2
            await asyncio.sleep(1)

    asyncio.run(scenario())


def test_what_the_gateway_answers_itself(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", trust_env=False) as http:
                health = await http.get("/health")
                assert (health.status_code, health.text) == (200, "healthy, agent not answering\n")
                assert health.headers.get_list("content-type") == ["text/plain"]
                for path in ("/", "/nope.html", "/_slot_guard/status", "/AIVoice/TTS/CosyVoice2"):
                    answer = await http.get(path)
                    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
                    assert answer.headers.get_list("content-type") == ["application/json"]
            assert cluster.started == 0

    asyncio.run(scenario())


def test_headers_and_log_tell_the_true_client(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            forged = {
                "X-Forwarded-For": "1.2.3.4",
                "X-Real-IP": "1.2.3.4",
                "X-Gpufleet-Instance": "x",
                "X-Request-ID": "x",
                "X-Forwarded-Ssl": "on",
                "X-Forwarded-Protocol": "ssl",
            }
            answer = await cluster.post(client="127.0.0.77", headers=forged)
            (gpu,) = [gpu for gpu in cluster.gpus.values() if gpu.started]
            (instance,) = [name for name, candidate in cluster.gpus.items() if candidate is gpu]
            assert gpu.headers["x-forwarded-for"] == gpu.headers["x-real-ip"] == "127.0.0.77"
            assert gpu.headers["x-gpufleet-instance"] == instance
            assert gpu.headers["x-request-id"] == answer.headers["x-request-id"] != "x"
            assert gpu.headers["connection"] == "close"
            assert gpu.headers["x-forwarded-proto"] == "http"
            assert not {"x-forwarded-ssl", "x-forwarded-protocol"} & gpu.headers.keys()
            assert gpu.headers["host"] == answer.request.url.netloc.decode()
            (line,) = await gateway.logged()
            for part in (
                "127.0.0.77 - -",
                "200 2",
                f"{instance}.sock",
                "upstream_status=200",
                answer.headers["x-request-id"],
            ):
                assert part in line

    asyncio.run(scenario())


def test_a_client_that_hangs_up_keeps_what_still_works_for_it(gateway):
    """Else one client with a short time-out and retries would take the whole fleet."""

    async def scenario():
        async with running(gateway, article_fleet(), gateway_worker_processes="4") as cluster:
            for gpu in cluster.gpus.values():
                gpu.seconds = 1.5
            assert await cluster.burst(6, clients=1, timeout=0.3) == [None] * 6
            assert statuses(await cluster.burst(6, clients=1)) == {503: 6}
            assert statuses([await cluster.post(client="127.0.0.99")]) == {200: 1}
            await asyncio.sleep(1)

    asyncio.run(scenario())


def test_a_client_at_its_limit_may_ask_again_as_soon_as_it_is_answered(gateway):
    """It keeps as many connections as it may have requests, and none of them is refused."""

    async def converse(seen):
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        for _ in range(300):
            writer.write(f"POST {ROUTE}generate HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            seen.append(int(head.split()[1]))
            await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1]))
        writer.close()

    async def scenario():
        async with running(gateway, article_fleet(), gateway_worker_processes="4") as cluster:
            for gpu in cluster.gpus.values():
                gpu.seconds = 0
            seen: list[int] = []
            await asyncio.gather(*(converse(seen) for _ in range(6)))
            assert collections.Counter(seen) == {200: 1800}

    asyncio.run(scenario())

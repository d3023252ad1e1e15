"""Who may ask: keys through the rendered nginx, in front of simulated GPUs that say what reached them."""

import asyncio
import json
from base64 import b64encode

import httpx
import pytest

from tests.templates.conftest import ALICE, BOB, CAROL, KEYS, PORT, ROUTE, article_fleet, running
from tests.templates.test_gateway import statuses
from tools.apikey import hash_of, new_key

OTHER = {
    "clone": {
        "route": "/clone/",
        "app": "app:app",
        "code": {"source": "."},
        "conda_env": "tts",
        "base_port": 12421,
        "client_limit": 6,
    }
}


def bearer(key):
    return {"headers": {"Authorization": f"Bearer {key}"}}


def keyed(keys=None, **fields):
    """The article's fleet for holders of keys."""
    return article_fleet(entrance={"api_keys": keys or KEYS}, **fields)


async def at_once(cluster, count, key, clients=2, **request):
    """Send requests with one key from several addresses; return how many were answered how."""
    posts = [cluster.post(client=f"127.0.0.{10 + n % clients}", **bearer(key), **request) for n in range(count)]
    return statuses(await asyncio.gather(*posts))


label, identity, secret = ALICE.split(".")
STRANGERS = {
    "nothing": {},
    "another secret": {"Authorization": f"Bearer {new_key('alice')}"},
    "another secret of a known id": {"Authorization": f"Bearer {label}.{identity}.{'A' * 43}"},
    "the secret of another label": {"Authorization": f"Bearer bob.{identity}.{secret}"},
    "an unknown label": {"Authorization": f"Bearer mallory.{identity}.{secret}"},
    "the label alone": {"Authorization": "Bearer alice"},
    "the hash": {"Authorization": f"Bearer {hash_of(ALICE)}"},
    "a character less": {"Authorization": f"Bearer {ALICE[:-1]}"},
    "a character more": {"Authorization": f"Bearer {ALICE}A"},
    "a space more": {"Authorization": f"Bearer  {ALICE}"},
    "something before it": {"Authorization": f"x Bearer {ALICE}"},
    "no scheme": {"Authorization": ALICE},
    "another scheme": {"Authorization": f"Basic {b64encode(ALICE.encode()).decode()}"},
    "the scheme in X-API-Key": {"X-API-Key": f"Bearer {ALICE}"},
    "a wrong X-API-Key beside a right one": {"X-API-Key": "x", "Authorization": f"Bearer {ALICE}"},
    "a name of ours": {"X-Gpufleet-Client": "alice"},
}


def test_who_has_no_key_is_told_so_and_starts_nothing(gateway):
    async def scenario():
        async with running(gateway, keyed()) as cluster:
            for name, headers in STRANGERS.items():
                answer = await cluster.post(headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized"), name
                assert answer.json()["error"]["message"] == (
                    "An API key is needed: Authorization: Bearer KEY / 需要有效的 API 密钥"
                )
                assert answer.headers["content-type"] == "application/json"
                assert answer.headers["www-authenticate"] == 'Bearer realm="gpufleet"'
                assert len(answer.headers.get_list("x-request-id")) == 1
            answer = await cluster.post(path=f"generate?api_key={ALICE}")
            assert answer.status_code == 401
            assert cluster.started == 0
            assert (await cluster.ask("/health")).status_code == 200
            for line in await gateway.logged(len(STRANGERS) + 1, "gateway-refusals.log"):
                assert line.startswith("127.0.0.1 - - [") and " 401 " in line

    asyncio.run(scenario())


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {ALICE}"}, {"X-API-Key": ALICE}], ids=list)
def test_a_key_opens_and_its_label_is_all_that_shows_of_it(gateway, headers):
    async def scenario():
        async with running(gateway, keyed()) as cluster:
            forged = {"X-Gpufleet-Client": "bob", "X_Gpufleet_Client": "bob"}
            assert (await cluster.post(headers={**headers, **forged})).status_code == 200
            both = {"Authorization": f"Bearer {BOB}", "X-API-Key": ALICE}
            assert (await cluster.post(headers=both)).status_code == 200
            for gpu in cluster.gpus.values():
                assert gpu.headers.get("x-gpufleet-client", "alice") == "alice"
                assert not {"authorization", "x-api-key"} & gpu.headers.keys()
                assert ALICE not in str(gpu.headers) and BOB not in str(gpu.headers)
            for line in await gateway.logged(2):
                assert line.startswith("127.0.0.1 - alice [")

    asyncio.run(scenario())


def test_no_log_and_no_file_that_all_may_read_has_a_key_or_its_hash(gateway):
    """Also where nginx complains: of a body that is too large, of a request that is none, of a GPU that fails."""

    async def scenario():
        async with running(gateway, keyed(body_limit_megabytes=1)) as cluster:
            await cluster.gpus["cosyvoice2-gpu01-0"].stop()
            await at_once(cluster, 12, ALICE)
            assert (await cluster.post(content=bytes(2_000_000), **bearer(ALICE))).status_code == 413
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            writer.write(f"GET {ROUTE} HTTP/1.1\r\nAuthorization: Bearer {ALICE}\r\nHost: x\0\r\n\r\n".encode())
            assert b" 400 " in await reader.readline()
            writer.close()
        logs = {path.name: path.read_text() for path in (gateway.folder / "var/log/nginx").iterdir()}
        assert all(logs.values()) and {"error.log", "cosyvoice2_access.log", "gateway-refusals.log"} <= logs.keys()
        for text in (*logs.values(), gateway.configuration.read_text()):
            assert ALICE.split(".")[2] not in text and hash_of(ALICE).split(".")[2] not in text

    asyncio.run(scenario())


def test_without_keys_nobody_is_asked_and_nobody_can_have_a_label(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            headers = {"Authorization": "Bearer of-the-service", "X-Gpufleet-Client": "alice"}
            assert (await cluster.post(headers=headers)).status_code == 200
            (gpu,) = [gpu for gpu in cluster.gpus.values() if gpu.started]
            assert gpu.headers["authorization"] == "Bearer of-the-service"
            assert "x-gpufleet-client" not in gpu.headers

    asyncio.run(scenario())


@pytest.mark.parametrize("workers", ["1", "4"])
def test_a_key_has_its_limit_from_however_many_addresses(gateway, workers):
    async def scenario():
        async with running(gateway, keyed(), gateway_worker_processes=workers) as cluster:
            assert await at_once(cluster, 20, ALICE, clients=2) == {200: 4, 503: 16}
            together = await asyncio.gather(*(at_once(cluster, 10, key, clients=1) for key in (ALICE, BOB, CAROL)))
            assert [answers[200] for answers in together[:2]] == [4, 4], "each its own, though from one address"
            assert together[2][200] == 4, "what is left of twelve slots"
            assert await at_once(cluster, 20, CAROL, clients=4) == {200: 6, 503: 14}, "the limit of a client"

    asyncio.run(scenario())


def test_a_key_has_one_limit_over_all_services(gateway):
    async def scenario():
        async with running(gateway, keyed(others=OTHER)) as cluster:
            for gpu in cluster.gpus.values():
                gpu.seconds = 1
            first = asyncio.create_task(at_once(cluster, 3, ALICE))
            while cluster.running < 3:
                await asyncio.sleep(0.01)
            async with httpx.AsyncClient(trust_env=False) as http:
                url = f"http://127.0.0.1:{PORT}/clone/generate"
                others = await asyncio.gather(*(http.post(url, **bearer(ALICE)) for _ in range(3)))
            assert statuses(others) == {200: 1, 503: 2}
            assert await first == {200: 3}

    asyncio.run(scenario())


def test_a_key_opens_the_services_that_it_is_for(gateway):
    keys = {"alice": {**KEYS["alice"], "services": ["clone"]}, "bob": {**KEYS["bob"], "services": ["cosyvoice2"]}}

    async def scenario():
        async with running(gateway, keyed(keys, others=OTHER)) as cluster:
            answer = await cluster.post(**bearer(ALICE))
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
            assert cluster.started == 0
            assert (await cluster.post(**bearer(BOB))).status_code == 200
            (line,) = await gateway.logged(name="gateway-refusals.log")
            assert line.startswith("127.0.0.1 - alice [") and " 403 " in line

    asyncio.run(scenario())


async def taken_over(cluster, key, status):
    """Wait until the gateway answers a key so, and nothing of it answers as before."""
    async with asyncio.timeout(5):
        while (await cluster.post(**bearer(key))).status_code != status:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.4)  # nginx's old workers go on to accept for a moment beside the new ones


def test_keys_are_changed_under_requests_in_flight(gateway):
    """Two keys at a time, then the new one alone: its holder never waits, nor does who is being served."""
    newer = new_key("alice")
    fleets = [
        keyed({"alice": {"hashes": list(map(hash_of, keys)), "in_flight": 4}}) for keys in ([ALICE, newer], [newer])
    ]

    async def scenario():
        async with running(gateway, keyed()) as cluster:
            await taken_over(cluster, newer, 401)
            for fleet, old_key in zip(fleets, (200, 401), strict=True):
                for gpu in cluster.gpus.values():
                    gpu.seconds = 2
                in_flight = asyncio.create_task(at_once(cluster, 3, ALICE))
                while cluster.running < 3:
                    await asyncio.sleep(0.01)
                for gpu in cluster.gpus.values():
                    gpu.seconds = 0
                gateway.write(fleet)
                gateway.reload()
                await taken_over(cluster, newer, 200)
                await taken_over(cluster, ALICE, old_key)
                assert not in_flight.done()
                for gpu in cluster.gpus.values():
                    gpu.seconds = 0.5
                assert await at_once(cluster, 4, newer) == {200: 1, 503: 3}, "both are alice, whose three go on"
                assert await in_flight == {200: 3}

    asyncio.run(scenario())


def test_keys_begin_on_a_gateway_that_had_none_and_end_again(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            assert (await cluster.post()).status_code == 200
            gateway.write(keyed())
            gateway.reload()
            await taken_over(cluster, "none", 401)
            assert await at_once(cluster, 6, ALICE) == {200: 4, 503: 2}
            gateway.write(article_fleet())
            gateway.reload()
            await taken_over(cluster, "none", 200)

    asyncio.run(scenario())


def test_a_killed_worker_takes_no_share_of_a_key_with_it(gateway):
    async def scenario():
        async with running(gateway, keyed()) as cluster:
            with gateway.renewed():
                for gpu in cluster.gpus.values():
                    gpu.seconds = 1
                cut = [cluster.post(**bearer(ALICE)) for _ in range(4)]
                requests = asyncio.gather(*cut, return_exceptions=True)
                while cluster.running < 4:
                    await asyncio.sleep(0.01)
                gateway.kill_workers()
                # 502 is what the worker that clients are at tells of one that died before it with the inner server.
                assert all(isinstance(answer, httpx.TransportError) or answer.is_error for answer in await requests)
                while cluster.running:
                    await asyncio.sleep(0.01)
                await taken_over(cluster, ALICE, 200)
                assert await at_once(cluster, 6, ALICE) == {200: 4, 503: 2}

    asyncio.run(scenario())


def test_the_access_log_as_json_has_the_same_fields_and_survives_what_clients_say(gateway):
    said = 'a"b\\c\t}'

    async def scenario():
        async with running(gateway, keyed(), gateway_log_format="json") as cluster:
            headers = {"Authorization": f"Bearer {ALICE}", "User-Agent": said, "Referer": said}
            answer = await cluster.post(path="generate?x=1", headers=headers)
            (entry,) = map(json.loads, await gateway.logged())
            assert entry["client"] == "alice"
            assert entry["remote_addr"] == "127.0.0.1"
            assert entry["request"] == f"POST {ROUTE}generate?x=1 HTTP/1.1"
            assert entry["status"] == 200 and entry["body_bytes_sent"] == 2
            assert entry["http_user_agent"] == entry["http_referer"] == said
            assert entry["upstream_addr"].endswith(".sock") and entry["upstream_status"] == "200"
            assert float(entry["upstream_response_time"]) > 0.2 and entry["request_time"] > 0.2
            assert entry["request_id"] == answer.headers["x-request-id"]
            await cluster.post()
            (refused,) = map(json.loads, await gateway.logged(name="gateway-refusals.log"))
            assert (refused["status"], refused["client"], refused["upstream_addr"]) == (401, "-", "")

    asyncio.run(scenario())

"""The fleet page behind the real nginx: its files, who may see them, and the agent's stream of events."""

import asyncio
import contextlib
import json
import time

import httpx
import pytest
from ansible_collections.gpufleet.core.plugins.filter.release import code_releases
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import PAGE_DIRECTORY
from fleet_agent import viewers

from tests.templates.conftest import PORT, PROJECT, ROUTE, article_fleet, running
from tests.templates.render import role_variables
from tests.templates.test_gateway import statuses

PAGE = f"http://127.0.0.1:{PORT}/cluster/"


def test_the_page_lies_where_the_agents_release_brings_it():
    variables = role_variables("agent")
    assert "code_releases('/opt/gpufleet')" in variables["__agent_release"]
    name, code = variables["__agent_name"], variables["__agent_code"]
    release = code_releases({name: {"code": code}}, "/opt/gpufleet")[name]
    assert f"{release['link']}/page" == PAGE_DIRECTORY
    assert (PROJECT / code["source"] / "page/index.html").is_file()


@pytest.mark.parametrize("route", ["/", ROUTE])
def test_the_page_is_files_of_known_types_under_a_strict_policy(gateway, route):
    async def scenario():
        async with running(gateway, article_fleet(route=route)) as cluster:
            for path, kind in {
                "": "text/html; charset=utf-8",
                "page.css": "text/css; charset=utf-8",
                "page.js": "text/javascript; charset=utf-8",
                "stream.js": "text/javascript; charset=utf-8",
                "texts.js": "text/javascript; charset=utf-8",
                "icon.svg": "image/svg+xml",
            }.items():
                answer = await cluster.ask(f"/cluster/{path}")
                assert answer.status_code == 200, path
                assert answer.content == (PROJECT / "service/agent/page" / (path or "index.html")).read_bytes()
                headers = answer.headers
                assert headers.get_list("content-type") == [kind]
                assert headers.get_list("cache-control") == ["no-store"]
                assert headers["x-content-type-options"] == "nosniff"
                assert headers["x-request-id"]
                policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
                assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
                assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert (await cluster.ask("/cluster")).headers["location"] == "/cluster/"
            assert cluster.started == 0

    asyncio.run(scenario())


def test_nothing_beside_the_page_is_served(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            beside = "fleet_agent/agent.py"
            for path in (
                "nothing",
                f"%2e%2e/{beside}",
                f"..%2f{beside}",
                f"x/%2e%2e/%2e%2e/{beside}",
                f"%2e%2e%2f{beside}",
            ):
                answer = await cluster.ask(f"/cluster/{path}")
                assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
            assert (await cluster.ask(f"/cluster../{beside}")).status_code == 404
            assert (await cluster.post(path="%2e%2e/%2e%2e/%2e%2e/cluster/")).status_code == 405

    asyncio.run(scenario())


def test_page_and_events_are_for_whom_the_status_is(gateway):
    async def scenario():
        async with running(gateway, article_fleet(), gateway_status_clients=["127.0.0.64/26"]) as cluster:
            await gateway.start_agent()
            for path in ("", "page.js", "status", "events"):
                answer = await cluster.ask(f"/cluster/{path}")
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
            assert (await cluster.ask("/cluster/", "127.0.0.70")).status_code == 200
            async with watching("127.0.0.70") as stream:
                assert (await stream.event())[0] == "whole"

    asyncio.run(scenario())


class Stream:
    """An open stream of events."""

    def __init__(self, answer):
        self.answer = answer
        self._lines = answer.aiter_lines()

    async def event(self):
        """Name and document of the next event."""
        name, data, blank = [await self._lines.__anext__() for _ in range(3)]
        assert blank == ""
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@contextlib.asynccontextmanager
async def watching(client="127.0.0.1"):
    """Ask for the events from a client address."""
    transport = httpx.AsyncHTTPTransport(local_address=client, verify=False)
    async with (
        httpx.AsyncClient(transport=transport, timeout=5, trust_env=False) as http,
        http.stream("GET", f"{PAGE}events") as answer,
    ):
        yield Stream(answer)


def test_each_pass_reaches_a_viewer_as_it_ends(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            await gateway.start_agent()
            async with watching() as stream:
                assert stream.answer.headers["content-type"] == "text/event-stream"
                name, known = await stream.event()
                assert (name, len(known["instances"])) == ("whole", 6)
                await stream.event()
                cluster.gpus["cosyvoice2-gpu01-0"].told = {"in_flight": 1}
                began = time.monotonic()
                states = [await stream.event() for _ in range(3)]
                assert 1 < time.monotonic() - began < 4, "as they come, and not in one piece"
                (changed,) = next(change["instances"] for _, change in states if change["instances"])
                assert (changed["id"], changed["in_flight"]) == ("cosyvoice2-gpu01-0", 1)

    asyncio.run(scenario())


def test_an_address_may_open_so_many_streams_and_they_count_against_none_of_its_requests(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster, contextlib.AsyncExitStack() as watchers:
            await gateway.start_agent()
            streams = [await watchers.enter_async_context(watching("127.0.0.10")) for _ in range(8)]
            assert [(await stream.event())[0] for stream in streams] == ["whole"] * 8
            refused = await cluster.ask("/cluster/events", "127.0.0.10")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
            assert (await cluster.ask("/cluster/status", "127.0.0.10")).status_code == 200
            async with watching("127.0.0.20") as stream:
                assert (await stream.event())[0] == "whole"
            busy = [cluster.post(client="127.0.0.10") for _ in range(8)]
            assert statuses(await asyncio.gather(*busy)) == {200: 6, 503: 2}
            await watchers.aclose()
            ends = time.monotonic() + 1
            while True:  # who leaves is gone at once, and not only when he misses an event or two
                async with watching("127.0.0.10") as stream:
                    if stream.answer.status_code == 200:
                        break
                assert time.monotonic() < ends

    asyncio.run(scenario())


def test_no_more_than_so_many_watch(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster, contextlib.AsyncExitStack() as watchers:
            await gateway.start_agent()
            clients = [f"127.0.0.{10 + number % 13}" for number in range(viewers.MOST)]
            streams = [await watchers.enter_async_context(watching(client)) for client in clients]
            assert {stream.answer.status_code for stream in streams} == {200}
            refused = await cluster.ask("/cluster/events")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
            assert refused.headers["retry-after"] == "1"
            assert (await cluster.ask("/cluster/status")).status_code == 200

    asyncio.run(scenario())


def test_without_an_agent_there_is_the_page_and_the_word_that_it_does_not_answer(gateway):
    async def scenario():
        async with running(gateway, article_fleet()) as cluster:
            answer = await cluster.ask("/cluster/events")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "agent_not_answering")
            assert (await cluster.ask("/cluster/")).status_code == 200

    asyncio.run(scenario())

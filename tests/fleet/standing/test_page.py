"""The fleet page, as the roll-out brought it to the gateway."""

import json
import re
from typing import Any

import httpx
import pytest

from testbed import PROJECT

FILES = {path.name: path.read_bytes() for path in (PROJECT / "service/agent/page").iterdir()}


@pytest.fixture
def cluster(gateway: dict[str, Any]) -> str:
    """URL of the page."""
    return f"{gateway['url']}/cluster/"


def test_a_browser_gets_the_page_and_all_its_files(cluster: str) -> None:
    with httpx.Client(base_url=cluster, trust_env=False) as http:
        page = http.get("")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert set(re.findall(r'(?:href|src)="([^"]+)"', page.text)) - {"status"} <= FILES.keys()
        for name, content in FILES.items():
            assert http.get(name).content == content, name


def test_the_stream_tells_the_fleet_and_goes_on(cluster: str, fleet: dict[str, Any]) -> None:
    with httpx.stream("GET", f"{cluster}events", trust_env=False, timeout=5) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        lines = (line for line in answer.iter_lines() if line)
        events = [(next(lines), json.loads(next(lines).removeprefix("data: "))) for _ in range(3)]
    assert [name for name, _ in events] == ["event: whole", "event: change", "event: change"]
    whole = events[0][1]
    assert [one["id"] for one in whole["instances"]] == [instance["id"] for instance in fleet["instances"]]
    assert whole["total_capacity"] == fleet["capacity"]
    assert not [change for change in whole["changes"] if "by" in change]

"""Real Prometheus and exporters on loopback, as the role starts them, before the real gateway and its agent."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from testbed.hosts import NVIDIA_SMI
from testbed.shell import unpack
from tests.templates.conftest import KEYS, ROUTE, TLS, TLS_PORT, article_fleet, running
from tests.templates.render import PROJECT, render, role_value
from tests.unit.service_helpers import free_port

ROLE = PROJECT / "roles/monitoring"
MONITOR, STRANGER = "127.0.0.1", "127.0.0.66"
PACKAGES = (
    "prometheus",
    "prometheus-node-exporter",
    "prometheus-nginx-exporter",
    "prometheus-blackbox-exporter",
    "mtail",
)
XID = "1767225600.000000 gpu01 kernel: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."
WITHIN = 30
"""Seconds within which what Prometheus is to see must be there: many scrapes, on a machine that does other things."""


@pytest.fixture(scope="session")
def programs():
    """Where the distribution's monitoring is unpacked."""
    folder = PROJECT / ".cache/monitoring"
    unpack(folder, *PACKAGES)
    return folder


@pytest.fixture(scope="session")
def promtool(programs):
    """A function that calls promtool, which must be content."""

    def call(*arguments):
        done = subprocess.run([programs / "usr/bin/promtool", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return call


@pytest.fixture(scope="module")
def value():
    """`value(name, fleet, host)` is a variable of the role on a host.

    In a process of its own: Ansible finds the filters of a collection only where no import went before it.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def of(name, fleet, host, **variables):
            given = {"inventory_hostname": host, **variables}
            return pool.submit(role_value, "monitoring", name, fleet, **given).result()

        yield of


def watched_fleet(**fields):
    """The article's fleet with a host that watches it; every port is a free one of this machine."""
    fleet = article_fleet(**fields)
    fleet["monitoring"] = [{"host": "monitor", "address": MONITOR}]
    fleet["monitoring_ports"] = {name: free_port() for name in fleet["monitoring_ports"]}
    return fleet


class Watch:
    """What the role starts on its hosts, started below a folder."""

    def __init__(self, programs, folder, fleet):
        self.programs, self.folder, self.fleet = programs, folder, fleet
        self.url = f"http://127.0.0.1:{fleet['monitoring_ports']['prometheus']}/api/v1"
        self.http = httpx.Client(trust_env=False, timeout=10)
        self._running = []

    def moved(self, text):
        """Move absolute paths below the folder."""
        for path in ("/etc/", "/var/log/nginx", "/var/lib/prometheus"):
            text = text.replace(path, f"{self.folder}{path}")
        return text

    def write(self, unit):
        """Write the files of a unit."""
        for path, text in {**unit["files"], **unit.get("watched", {})}.items():
            file = Path(self.moved(path))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.moved(text))

    def start(self, unit, arguments=""):
        """Start a unit's program; `arguments` is what an operator may set in /etc/default."""
        self.write(unit)
        (drop_in,) = (text for path, text in unit["files"].items() if path.endswith("/gpufleet.conf"))
        command = self.moved(drop_in.splitlines()[-1].removeprefix("ExecStart="))
        words = shlex.split(command.replace("$ARGS", arguments))
        words[0] = f"{self.programs}{words[0]}"
        with (self.folder / f"{unit['name']}.log").open("w") as log:
            self._running.append(subprocess.Popen(words, stdout=log, stderr=log, cwd=self.folder))

    def stop(self):
        """Stop all programs."""
        for program in self._running:
            program.terminate()
        for program in self._running:
            program.wait(10)
        self.http.close()

    def ask(self, path, **parameters):
        """Ask Prometheus."""
        response = self.http.get(f"{self.url}/{path}", params=parameters)
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise httpx.TransportError("it still starts")
        answer = response.json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def query(self, expression):
        """The series of an expression as it is now: their labels, and the value."""
        return [(one["metric"], float(one["value"][1])) for one in self.ask("query", query=expression)["result"]]

    def firing(self):
        """Alerts that fire, by name, with the instance or host that each is about."""
        alerts = self.ask("alerts")["alerts"]
        return {
            (one["labels"]["alertname"], one["labels"].get("instance") or one["labels"].get("host"))
            for one in alerts
            if one["state"] == "firing"
        }


async def until(condition, shown=lambda: ""):
    """Wait until `condition()` holds."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
            assert time.monotonic() - began < WITHIN, shown()
        assert time.monotonic() - began < WITHIN, "Prometheus does not answer"
        await asyncio.sleep(0.2)


def measured(folder, devices):
    """Write the metrics of simulated GPUs, one of which is not there, as the timer does."""
    tools, textfiles = folder / "tools", folder / "var/lib/prometheus/node-exporter"
    tools.mkdir()
    textfiles.mkdir(parents=True)
    (tools / "cards").write_text("".join(f"GPU-{number}\n" for number in range(devices - 1)))
    simulated = NVIDIA_SMI.read_text().replace("/etc/nvidia-smi-simulated", str(tools / "cards"))
    for name, text in (("nvidia-smi", simulated), ("journalctl", f"#!/bin/sh\necho '{XID}'\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    command = [sys.executable, ROLE / "files/gpu_metrics.py", "--output", textfiles / "gpufleet.prom"]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run([*command, *map(str, range(devices))], check=True, env=environment)
    return f"--collector.textfile.directory={textfiles}"


def expressions(dashboard):
    """The expressions of a dashboard, with its variables filled in."""
    variables = {"$host": "gpu01", "$service": "cosyvoice2"}
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for name, text in variables.items():
        found = [expression.replace(name, text) for expression in found]
    return found


DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROLE / "files/dashboards").glob("*.json"))}
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load((ROLE / "files/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}
WORDS = re.compile(
    r"sum|max|min|avg|count|by|on|and|or|unless|offset|bool|rate|increase|changes|time|vector|predict_linear|"
    r"avg_over_time|min_over_time|max_over_time|histogram_quantile"
)


def metrics_of(expression):
    """Names of the metrics in an expression: no labels, ranges, functions or keywords."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|on) *\([^)]*\)|\"[^\"]*\"", " ", expression)
    return {word for word in re.findall(r"\b[a-zA-Z_:][\w:]*", bare) if not WORDS.fullmatch(word)}


def used():
    """Every metric in a rule, a panel or a variable of a dashboard, but for Prometheus' own account of alerts."""
    texts = [rule["expr"] for rule in ALERTS.values()]
    for dashboard in DASHBOARDS.values():
        texts += expressions(dashboard)
        queries = [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
        texts += [query["query"].partition("(")[2].partition(",")[0] for query in queries]
    return set().union(*map(metrics_of, texts)) - {"ALERTS"}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("inventory/yours/alertmanager.yml", f"{PROJECT}/inventory/yours/alertmanager.yml"),
        ("/srv/alertmanager.yml", "/srv/alertmanager.yml"),
        ("~/alertmanager.yml", str(Path("~/alertmanager.yml").expanduser())),
    ],
)
def test_a_relative_path_of_alertmanagers_configuration_starts_in_the_project(value, given, found):
    variables = {"role_path": str(ROLE), "monitoring_alertmanager_config": given}
    assert value("__monitoring_alertmanager_source", watched_fleet(), "monitor", **variables) == found


def test_prometheus_is_asked_where_it_listens(value):
    text = value("__monitoring_targets", watched_fleet(), "monitor", monitoring_address="10.0.0.9")
    (target, *_) = json.loads(text)
    assert target["targets"][0].startswith("10.0.0.9:")


def test_each_alert_fires_when_it_should_and_not_otherwise(promtool):
    tests = PROJECT / "tests/templates/alerts_test.yml"
    promtool("test", "rules", tests)
    fired = set(re.findall(r"alertname[:=] ?\"?(\w+)", tests.read_text()))
    assert fired == set(ALERTS)


def test_each_alert_says_what_to_do_in_both_languages():
    for name, rule in ALERTS.items():
        assert set(rule["annotations"]) == {"summary", "description", "summary_zh", "description_zh"}, name
        for key, text in rule["annotations"].items():
            assert bool(re.search("[\u4e00-\u9fff]", text)) == key.endswith("_zh"), (name, key)
        assert rule["labels"]["severity"] in {"warning", "critical"}, name


def test_dashboards_are_told_apart_and_lie_side_by_side():
    assert set(DASHBOARDS) == {"overview", "host", "service"}
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == 3
    for name, dashboard in DASHBOARDS.items():
        cells = [
            (panel["gridPos"]["x"] + column, panel["gridPos"]["y"] + row)
            for panel in dashboard["panels"]
            for column in range(panel["gridPos"]["w"])
            for row in range(panel["gridPos"]["h"])
        ]
        assert len(cells) == len(set(cells)) and max(column for column, _ in cells) < 24, name
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]), name


ARTICLE = (
    '127.0.0.1 - studio [25/Nov/2026:10:00:00 +0000] "POST /tts/ HTTP/1.1" %d 2 "-" "%s" "-" upstream_addr=unix:/x '
    "upstream_response_time=0.3 request_time=%s server_name=_ connections_active=3 upstream_status=200 request_id=f"
)
JSON = (
    '{"time":"2026-11-25T10:00:00+00:00","remote_addr":"127.0.0.1","client":"studio","request":"POST /tts/ HTTP/1.1",'
    '"status":%d,"body_bytes_sent":2,"http_user_agent":"%s","request_time":%s,"server_name":"_","request_id":"f"}'
)


@pytest.mark.parametrize("keys", [False, True], ids=["anybody", "api keys"])
def test_requests_are_counted_in_either_format_whatever_clients_call_themselves(programs, tmp_path, keys):
    logs = {
        "tts_access.log": [
            ARTICLE % (200, "curl", "0.300"),
            ARTICLE % (503, " 200 1 request_time=9.0 server_name=", "0.001"),
        ],
        "asr_access.log": [
            JSON % (200, "curl", "7.000"),
            JSON % (504, r"\"status\":200,\"request_time\":9.0,", "0.250"),
        ],
        "gateway-refusals.log": [ARTICLE % (401, "curl", "0.000"), "no line of ours"],
        "error.log": [ARTICLE % (500, "curl", "0.000")],
    }
    for name, lines in logs.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    fleet = article_fleet(entrance={"api_keys": KEYS} if keys else {})
    program = tmp_path / "gpufleet.mtail"
    program.write_text(render("monitoring", "requests.mtail.j2", fleet))
    command = [programs / "usr/bin/mtail", "--progs", program, "--logs", f"{tmp_path}/*.log"]
    options = ["--one_shot", "--one_shot_format=prometheus", "--emit_prog_label=false", "--logtostderr", "--port=0"]
    told = subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout
    client = 'client="studio",' if keys else ""
    counts = re.findall(rf'requests_total{{{client}service="(\w+)",status="(\d+)"}} (\d+)', told)
    assert {(service, int(status)): int(count) for service, status, count in counts} == {
        **{("tts", 200): 1, ("tts", 503): 1, ("asr", 200): 1, ("asr", 504): 1, ("gateway", 401): 1},
    }
    sums = dict(re.findall(r'request_seconds_sum\{service="(\w+)"\} ([\d.]+)', told))
    assert (float(sums["tts"]), float(sums["asr"])) == (0.301, 7.25)


def test_metrics_are_told_apart_from_the_words_around_them():
    expression = 'sum by (host) (rate(a_total{b="c"}[5m])) / on (host) time() - d:e offset 2h > bool 0.5 * 3600'
    assert metrics_of(expression) == {"a_total", "d:e"}


def test_prometheus_sees_the_whole_fleet_and_tells_of_a_dead_instance(programs, promtool, value, gateway, certificate):
    """One scenario, because it takes ten programs: targets, every metric, every panel, and an alert from end to end."""
    fleet = watched_fleet(entrance=TLS)
    settings = {
        "monitoring_scrape_interval": "1s",
        "monitoring_alert_for": dict.fromkeys(("InstanceNotReady", "GpuGone", "CertificateExpires"), "1s"),
    }
    units = {
        host: {unit["name"].partition(".")[0]: unit for unit in value(name, fleet, host, **settings)}
        for host, name in (
            ("gpu01", "__monitoring_exporters"),
            ("gateway", "__monitoring_exporters"),
            ("monitor", "__monitoring_servers"),
        )
    }
    watch = Watch(programs, gateway.folder, fleet)

    def answer(path="generate", client=MONITOR, **request):
        transport = httpx.HTTPTransport(local_address=client, verify=False)
        with httpx.Client(transport=transport, trust_env=False, timeout=20) as http:
            return http.request(url=f"https://127.0.0.1:{TLS_PORT}{path}", **request)

    async def scenario():
        async with running(gateway, fleet, certificate=certificate) as cluster:
            await gateway.start_agent()
            # One exporter for all: the hosts of this fleet are addresses of this machine.
            watch.start(units["gpu01"]["prometheus-node-exporter"], measured(gateway.folder, devices=3))
            watch.start(units["gateway"]["prometheus-nginx-exporter"])
            watch.start(units["gateway"]["mtail"])
            watch.start(units["monitor"]["prometheus-blackbox-exporter"])
            prometheus = units["monitor"]["prometheus"]
            watch.write(prometheus)
            promtool(*map(watch.moved, prometheus["check"][1:]))
            watch.start(prometheus, f"--storage.tsdb.path={gateway.folder}/data")

            targets = json.loads(prometheus["watched"]["/etc/prometheus/gpufleet/targets.json"])
            await until(
                lambda: len(watch.query("up == 1")) == len(targets) == 10,
                lambda: [(one["scrapeUrl"], one["lastError"]) for one in watch.ask("targets")["activeTargets"]],
            )

            loop = asyncio.get_running_loop()
            for gpu in cluster.gpus.values():
                gpu.seconds = 0.05
            for _ in range(4):  # rates need an increase between two scrapes
                await loop.run_in_executor(None, lambda: answer(f"{ROUTE}generate", method="POST", content=b"{}"))
                await asyncio.sleep(1)
            served = 'gpufleet_gateway_requests_total{service="cosyvoice2",status="200"}'
            await until(lambda: [count for _, count in watch.query(served)] == [4])

            await until(
                lambda: used() <= set(watch.ask("label/__name__/values")),
                lambda: used() - set(watch.ask("label/__name__/values")),
            )
            for name, dashboard in DASHBOARDS.items():
                for expression in expressions(dashboard):
                    await until(lambda text=expression: watch.query(text), lambda at=(name, expression): at)
            for rule in ALERTS.values():
                watch.query(rule["expr"])

            dead = cluster.gpus["cosyvoice2-gpu02-1"]
            assert ("InstanceNotReady", "cosyvoice2-gpu02-1") not in watch.firing()
            await dead.stop()
            everywhere = {("GpuGone", host) for host in ("gateway", "monitor", *fleet["hosts"])}
            others = {("CertificateExpires", "gateway"), ("InstanceNotReady", "cosyvoice2-gpu02-1")}
            await until(lambda: watch.firing() == everywhere | others, watch.firing)
            await dead.start()
            await until(lambda: ("InstanceNotReady", "cosyvoice2-gpu02-1") not in watch.firing(), watch.firing)

            for path in ("", "/nginx", "/requests", "/node"):
                for client, status in ((MONITOR, 200), (STRANGER, 403)):
                    told = await loop.run_in_executor(
                        None, lambda at=path, by=client: answer(f"/cluster/metrics{at}", client=by, method="GET")
                    )
                    assert told.status_code == status, (path, client)

    try:
        asyncio.run(scenario())
    finally:
        watch.stop()

"""What is asked of whom, and when an alert fires: derived from the fleet."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import MONITORING_PORTS, derive
from ansible_collections.gpufleet.core.plugins.module_utils.monitoring import alert_rules, scrape_targets

PROJECT = Path(__file__).parents[2]
HOSTS = {
    "gpu01": {"ansible_host": "10.0.0.1", "gpu_count": 2},
    "gpu02": {"ansible_host": "fd00::2", "gpu_count": 1},
    "gw1": {"ansible_host": "10.0.0.100"},
    "gw2": {"ansible_host": "10.0.0.101"},
    "watcher": {"ansible_host": "10.0.0.9", "gpu_count": 1},
}
SERVICE = {"route": "/tts/", "app": "app:app", "code": {"source": "."}, "conda_env": "tts", "client_limit": 1}


TLS = {"gateway_tls": {"certificate": "c.pem", "key": "k.pem"}}


def fleet(monitoring=("watcher",), gpu_servers=("gpu01", "gpu02"), gateways=("gw1",), entrance=None, **service):
    hosts = {name: {**variables, **(entrance or {} if name in gateways else {})} for name, variables in HOSTS.items()}
    groups = {"gpu_servers": gpu_servers, "gateways": gateways, "monitoring": monitoring}
    return derive({"tts": {**SERVICE, **service}}, groups, hosts, conda_envs={"tts": {"lock": "."}})


def asked(given, host="watcher"):
    """Job, host and URL of every target, sorted."""
    rows = []
    for target in scrape_targets(given, host):
        (address,), labels = target["targets"], target["labels"]
        scheme, path = labels.get("__scheme__", "http"), labels.get("__metrics_path__", "/metrics")
        rows.append((labels["job"], labels["host"], f"{scheme}://{address}{path}"))
    return sorted(rows)


def test_a_fleet_that_nobody_watches():
    assert fleet(monitoring=())["monitoring"] == []
    assert derive({}, {"gpu_servers": ["gpu01"], "gateways": ["gw1"]}, HOSTS)["monitoring"] == []


def test_who_watches_is_known_by_address():
    watched = fleet()
    assert watched["faults"] == []
    assert watched["monitoring"] == [{"host": "watcher", "address": "10.0.0.9"}]


def test_gpu_servers_are_asked_themselves_and_all_else_through_the_gateway():
    assert asked(fleet()) == [
        ("agent", "gw1", "http://10.0.0.100:9999/cluster/metrics"),
        ("nginx", "gw1", "http://10.0.0.100:9999/cluster/metrics/nginx"),
        ("node", "gpu01", "http://10.0.0.1:9100/metrics"),
        ("node", "gpu02", "http://[fd00::2]:9100/metrics"),
        ("node", "gw1", "http://10.0.0.100:9999/cluster/metrics/node"),
        ("node", "watcher", "http://127.0.0.1:9100/metrics"),
        ("probe", "gw1", "http://127.0.0.1:9115/probe"),
        ("prometheus", "watcher", "http://127.0.0.1:9090/metrics"),
        ("requests", "gw1", "http://10.0.0.100:9999/cluster/metrics/requests"),
    ]


@pytest.mark.parametrize(
    ("address", "asked_at"),
    [
        ("127.0.0.1", "127.0.0.1:9090"),
        ("0.0.0.0", "127.0.0.1:9090"),
        ("[::]", "127.0.0.1:9090"),
        ("10.0.0.9", "10.0.0.9:9090"),
        ("[fd00::9]", "[fd00::9]:9090"),
    ],
)
def test_prometheus_asks_itself_where_it_listens(address, asked_at):
    targets = scrape_targets(fleet(), "watcher", address)
    assert [one["targets"] for one in targets if one["labels"]["job"] == "prometheus"] == [[asked_at]]


def test_no_two_targets_are_the_same_series():
    """Two gateways' agents tell of the same instances; Prometheus must not take one for the other."""
    given = fleet(gateways=("gw1", "gw2"), monitoring=("gw1", "watcher"), gpu_servers=("gpu01", "watcher"))
    assert given["faults"] == []
    for host in ("gw1", "watcher"):
        targets = [target["labels"] for target in scrape_targets(given, host)]
        told = {(labels["job"], labels["instance"]) for labels in targets}
        assert len(told) == len(targets)
        assert {labels.get("gateway") for labels in targets if labels["job"] == "agent"} == {"gw1", "gw2"}


def test_a_watcher_that_is_more_than_that_is_asked_once():
    both = fleet(monitoring=("gw1", "watcher"), gpu_servers=("gpu01", "watcher"))
    nodes = [row for row in asked(both) if row[0] == "node"]
    assert [host for _, host, _ in nodes] == ["gpu01", "gw1", "watcher"]
    assert nodes[2][2] == "http://10.0.0.9:9100/metrics"


def test_with_tls_the_gateway_is_asked_and_probed_by_it():
    targets = scrape_targets(fleet(entrance=TLS), "watcher")
    through = [target["labels"] for target in targets if target["targets"] == ["10.0.0.100:9443"]]
    assert {labels["__scheme__"] for labels in through} == {"https"} and len(through) == 4
    (probe,) = (target["labels"] for target in targets if target["labels"]["job"] == "probe")
    assert (probe["__param_target"], probe["__param_module"]) == ("https://10.0.0.100:9443/health", "gateway")


def test_an_address_that_gateways_have_in_common_is_probed_as_well():
    given = fleet(gateways=("gw1", "gw2"), entrance={"gateway_vip": {"address": "10.0.0.99"}})
    assert given["faults"] == []
    probes = [target["labels"] for target in scrape_targets(given, "watcher") if target["labels"]["job"] == "probe"]
    assert {labels["host"]: labels["__param_target"] for labels in probes} == {
        "gw1": "http://10.0.0.100:9999/health",
        "gw2": "http://10.0.0.101:9999/health",
        "10.0.0.99": "http://10.0.0.99:9999/health",
    }


@pytest.mark.parametrize("kind", sorted(MONITORING_PORTS))
def test_ports_of_monitoring_are_kept_free(kind):
    """On a host that is all three, each of them is taken."""
    everything = {"monitoring": ["watcher"], "gpu_servers": ["watcher"], "gateways": ["watcher"]}
    port = MONITORING_PORTS[kind]
    clash = fleet(**everything, base_port=port)
    assert [line for line in clash["faults"] if f"taken by monitoring ({kind})" in line], clash["faults"]
    assert not fleet(**{**everything, "monitoring": []}, base_port=port)["faults"]


RULES = {"groups": [{"name": "g", "rules": [{"alert": "A", "expr": "a", "for": "1m"}, {"alert": "B", "for": "2m"}]}]}


def test_the_wait_of_an_alert_can_be_set_and_no_other_changes():
    changed = alert_rules(RULES, {"B": "9s"})
    (group,) = changed["groups"]
    assert group == {"name": "g", "rules": [RULES["groups"][0]["rules"][0], {"alert": "B", "for": "9s"}]}
    assert alert_rules(RULES, {}) == RULES


def test_a_wait_for_no_alert_is_refused():
    with pytest.raises(ValueError, match=r"monitoring_alert_for names no alert: C\. Known are A, B\."):
        alert_rules(RULES, {"C": "9s"})


def test_no_play_of_monitoring_has_hosts_where_nobody_watches():
    program = Path(sys.executable).with_name("ansible-playbook")
    command = [program, "-i", "inventory/example", "playbooks/monitoring.yml", "--list-hosts"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert listed.count("hosts (0)") == 2, listed


def test_all_hosts_of_the_fleet_are_watched_where_somebody_does(tmp_path):
    inventory = yaml.safe_load((PROJECT / "inventory/example/hosts.yml").read_text())
    inventory["all"]["children"]["monitoring"] = {"hosts": {"watcher": {"ansible_host": "192.168.1.9"}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    program = Path(sys.executable).with_name("ansible-playbook")
    command = [program, "-i", tmp_path / "hosts.yml", "playbooks/monitoring.yml", "--list-hosts"]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert "hosts (5)" in listed and "hosts (1)" in listed, listed

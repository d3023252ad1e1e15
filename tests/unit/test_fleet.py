"""The derivation: the article's numbers, stability under edits, and properties of any inventory."""

import copy
from pathlib import Path

import pytest
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive
from hypothesis import given
from hypothesis import strategies as st

from tests.inventories.loader import derive_from

PROJECT = Path(__file__).parents[2]
CONDA_ENVS = {"tts": {"lock": "envs/tts"}}


def service(**fields):
    return {
        "route": "/tts/",
        "app": "app:app",
        "code": {"source": "."},
        "conda_env": "tts",
        "client_limit": 1,
        **fields,
    }


def fleet_of(hosts, services=None, groups=None, **settings):
    """Derive a fleet whose GPU servers are ``hosts``: variables by name."""
    members = {"gpu_servers": list(hosts), "gateways": ["gateway"], **(groups or {})}
    services = {"tts": service()} if services is None else services
    return derive(
        services, members, {**hosts, "gateway": {"ansible_host": "10.0.0.100"}}, conda_envs=CONDA_ENVS, **settings
    )


def endpoints(fleet):
    return [(instance["host"], instance["device"], instance["port"]) for instance in fleet["instances"]]


def test_the_articles_cluster():
    fleet = derive_from(PROJECT / "inventory/example")
    assert fleet["faults"] == []
    assert [f"{instance['address']}:{instance['port']}" for instance in fleet["instances"]] == [
        "192.168.1.10:12321",
        "192.168.1.10:12322",
        "192.168.1.11:12321",
        "192.168.1.11:12322",
        "192.168.1.12:12321",
        "192.168.1.12:12322",
    ]
    assert {instance["slots"] for instance in fleet["instances"]} == {2}
    assert {host["capacity"] for host in fleet["hosts"].values()} == {4}
    assert fleet["capacity"] == fleet["services"]["cosyvoice2"]["capacity"] == 12
    assert fleet["services"]["cosyvoice2"]["client_limit"] == 6
    assert fleet["gateways"] == [{"host": "gateway", "address": "192.168.1.100"}]
    assert fleet["port"] == 9999


def test_an_instance_has_one_name_everywhere():
    instance = fleet_of({"gpu01": {"gpu_count": 2}})["instances"][1]
    assert instance == {
        "id": "tts-gpu01-1",
        "service": "tts",
        "host": "gpu01",
        "gpu": 1,
        "device": "1",
        "address": "gpu01",
        "port": 12322,
        "slots": 2,
        "program": "gpufleet-tts-1",
        "socket": "/run/gpufleet-gateway/tts-gpu01-1.sock",
    }


def test_gpus_as_a_list():
    uuid = "GPU-5f3c2a10-0000-4000-8000-000000000001"
    cards = [0, {"device": 2, "slots": 3}, {"device": uuid, "index": 7}]
    fleet = fleet_of({"gpu01": {"gpus": cards}})
    assert fleet["faults"] == []
    assert endpoints(fleet) == [("gpu01", "0", 12321), ("gpu01", "2", 12323), ("gpu01", uuid, 12328)]
    assert [instance["slots"] for instance in fleet["instances"]] == [2, 3, 2]


def test_leaving_a_broken_card_out_moves_no_other():
    whole = fleet_of({"gpu01": {"gpus": [0, 1, 2, 3]}})
    without = fleet_of({"gpu01": {"gpus": [0, 2, 3]}})
    assert without["instances"] == [instance for instance in whole["instances"] if instance["gpu"] != 1]


def test_address_prefers_the_data_network():
    variables = {"gpu_count": 1, "ansible_host": "10.0.0.1", "fleet_address": "10.9.0.1"}
    assert fleet_of({"gpu01": variables})["instances"][0]["address"] == "10.9.0.1"


@pytest.mark.parametrize("given", ["fd00::1", "[fd00::1]"])
def test_an_ipv6_address_is_written_as_in_urls(given):
    assert fleet_of({"gpu01": {"gpu_count": 1, "ansible_host": given}})["instances"][0]["address"] == "[fd00::1]"


def test_services_share_a_host():
    services = {"tts": service(), "clone": service(route="/clone/", base_port=12421, slots=1)}
    fleet = fleet_of({"gpu01": {"gpu_count": 2}}, services)
    assert fleet["faults"] == []
    assert [(i["id"], i["port"]) for i in fleet["instances"]] == [
        ("clone-gpu01-0", 12421),
        ("clone-gpu01-1", 12422),
        ("tts-gpu01-0", 12321),
        ("tts-gpu01-1", 12322),
    ]
    assert fleet["hosts"]["gpu01"]["capacity"] == 6


def test_services_on_groups_of_their_own():
    services = {"tts": service(group="a"), "clone": service(route="/clone/", group="b")}
    hosts = {"gpu01": {"gpu_count": 2}, "gpu02": {"gpu_count": 1}}
    fleet = fleet_of(hosts, services, {"a": ["gpu01"], "b": ["gpu02"]})
    assert fleet["faults"] == []
    assert {(i["service"], i["host"]) for i in fleet["instances"]} == {("tts", "gpu01"), ("clone", "gpu02")}
    assert (fleet["services"]["tts"]["capacity"], fleet["services"]["clone"]["capacity"]) == (4, 2)


def test_numbers_as_text_are_numbers():
    """Extra variables and INI inventories give text."""
    fleet = fleet_of({"gpu01": {"gpu_count": "2"}}, {"tts": service(slots="3", base_port="13000")}, port="80")
    assert fleet["faults"] == []
    assert [(i["port"], i["slots"]) for i in fleet["instances"]] == [(13000, 3), (13001, 3)]
    assert fleet["port"] == 80


@pytest.mark.parametrize("nonsense", [None, 7, "x", [], [1], {"tts": None}, {"tts": []}, {7: service()}])
def test_nonsense_services_are_faults_not_exceptions(nonsense):
    assert derive(nonsense, {"gpu_servers": ["gpu01"], "gateways": ["g"]}, {"gpu01": {"gpu_count": 1}, "g": {}})[
        "faults"
    ]


@pytest.mark.parametrize("field", ["route", "app", "code", "conda_env", "environment", "packages", "group", "slots"])
@pytest.mark.parametrize("nonsense", [7, True, "//", [None], {"a": []}, 1.5, "²"])
def test_nonsense_fields_are_never_exceptions(field, nonsense):
    fleet_of({"gpu01": {"gpu_count": 1}}, {"tts": service(**{field: nonsense})})


@pytest.mark.parametrize("nonsense", [7, True, "//", [None], {"a": []}, {"path": 7}, {"path": "x", "body": {1: {2}}}])
def test_nonsense_smoke_requests_are_faults_not_exceptions(nonsense):
    assert fleet_of({"gpu01": {"gpu_count": 1}}, {"tts": service(smoke=nonsense)})["faults"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"path": "health"}, {"path": "/tts/health", "body": "", "content_type": "text/plain; charset=utf-8"}),
        (
            {"path": "x", "body": "好"},
            {"path": "/tts/x", "body": "好", "content_type": "text/plain; charset=utf-8"},
        ),
        (
            {"path": "x?stream=1", "body": {"text": "好"}},
            {"path": "/tts/x?stream=1", "body": '{"text": "好"}', "content_type": "application/json"},
        ),
        (
            {"path": "x", "body": "<a/>", "content_type": "text/xml"},
            {"path": "/tts/x", "body": "<a/>", "content_type": "text/xml"},
        ),
    ],
)
def test_smoke_requests_are_whole(wanted, expected):
    fleet = fleet_of({"gpu01": {"gpu_count": 1}}, {"tts": service(route="/tts/", smoke=wanted)})
    assert fleet["faults"] == []
    assert fleet["services"]["tts"]["smoke"] == expected


host_names = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
fleets = st.dictionaries(host_names, st.integers(1, 8), min_size=1, max_size=12)


@given(fleets, st.integers(1, 16))
def test_every_instance_is_unique_and_counted(counts, slots):
    fleet = fleet_of({host: {"gpu_count": n} for host, n in counts.items()}, {"tts": service(slots=slots)})
    instances = fleet["instances"]
    assert fleet["faults"] == []
    assert len(instances) == sum(counts.values())
    for keys in (("id",), ("socket",), ("address", "port"), ("host", "program"), ("host", "device")):
        assert len({tuple(instance[key] for key in keys) for instance in instances}) == len(instances)
    assert fleet["capacity"] == slots * len(instances) == sum(host["capacity"] for host in fleet["hosts"].values())


@given(fleets, host_names, st.integers(1, 8))
def test_adding_a_host_touches_no_other(counts, name, count):
    before = {host: {"gpu_count": n} for host, n in counts.items() if host != name}
    after = fleet_of({**before, name: {"gpu_count": count}})["instances"]
    assert [i for i in after if i["host"] != name] == (fleet_of(before)["instances"] if before else [])


@given(fleets, st.randoms())
def test_the_order_of_the_inventory_does_not_matter(counts, random):
    hosts = {host: {"gpu_count": n} for host, n in counts.items()}
    names = list(hosts)
    random.shuffle(names)
    assert fleet_of({name: hosts[name] for name in names}) == fleet_of(hosts)


@given(fleets)
def test_the_inventory_is_only_read(counts):
    hosts = {host: {"gpu_count": n} for host, n in counts.items()}
    services = {"tts": service()}
    given_hosts, given_services = copy.deepcopy(hosts), copy.deepcopy(services)
    fleet_of(hosts, services)
    assert (hosts, services) == (given_hosts, given_services)

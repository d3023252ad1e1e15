"""The derivation: the article's numbers, stability under edits, and properties of any inventory."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml
from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import unsupported_environment
from ansible_collections.gpufleet.core.plugins.modules import drain, rollout_lock
from hypothesis import example, given, settings
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


def fleet_of(hosts, services=None, groups=None, gateway=None, **settings):
    """Derive a fleet whose GPU servers are ``hosts``: variables by name. ``gateway`` are variables of the gateway."""
    members = {"gpu_servers": list(hosts), "gateways": ["gateway"], **(groups or {})}
    services = {"tts": service()} if services is None else services
    variables = {**hosts, "gateway": {"ansible_host": "10.0.0.100", **(gateway or {})}}
    return derive(services, members, variables, conda_envs=CONDA_ENVS, **settings)


def endpoints(fleet):
    return [(instance["host"], instance["device"], instance["port"]) for instance in fleet["instances"]]


@pytest.mark.parametrize("module", [drain, rollout_lock])
def test_modules_keep_their_state_where_the_fleet_says(module):
    options = yaml.safe_load(module.DOCUMENTATION)["options"]
    assert options["directory"]["default"] == fleet_of({"gpu01": {"gpu_count": 1}})["state_directory"]


def test_a_drain_takes_as_long_as_a_request_of_any_service_may():
    services = {
        "tts": service(time_limit_seconds=60),
        "asr": service(route="/asr/", time_limit_seconds=600, base_port=13321),
    }
    assert fleet_of({"gpu01": {"gpu_count": 1}}, services)["drain_seconds"] == 615
    assert fleet_of({"gpu01": {"gpu_count": 1}}, {})["drain_seconds"] == 15


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
    assert fleet["gateways"] == [{"host": "gateway", "address": "192.168.1.100", "url": "http://192.168.1.100:9999"}]
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


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.text(max_size=6)
    | st.sampled_from(
        ["5\n", "٣", "²", "1e3", "9" * 5000, "//", "a b", "\0", "{{ x }}", "10.0.0.1\n", "[::1", "fe80::1%lo"]
    ),
    lambda some: (
        st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers() | st.none(), some, max_size=3)
    ),
    max_leaves=6,
)


ENDINGS = ["\n", " ", "\0", ";", "}", '"', "'", "\u2028", "%", "٣"]
GOOD_HOST = {"ansible_host": "10.0.0.1", "gpu_count": 2, "gpus": [0, {"device": "GPU-1", "index": 3, "slots": 1}]}
GOOD_SERVICE = service(
    packages=["espeak-ng"],
    environment={"A": "it's", "B": 7},
    base_port=12421,
    slots="1",
    smoke={"path": "x", "body": "y", "content_type": "text/plain"},
)


def spoilt(good):
    """Another value in the place of a good one, or the good one with something behind it, however deep it lies."""
    if isinstance(good, dict):
        names = [st.tuples(st.just(name), spoilt(value)) for name, value in good.items()]
        values = st.one_of(names).map(lambda one: {**good, one[0]: one[1]})
        return values | st.sampled_from(list(good)).flatmap(
            lambda name: st.sampled_from(ENDINGS).map(
                lambda end: {**{n: v for n, v in good.items() if n != name}, name + end: good[name]}
            )
        )
    if isinstance(good, list):
        return st.integers(0, len(good) - 1).flatmap(
            lambda at: spoilt(good[at]).map(lambda one: [*good[:at], one, *good[at + 1 :]])
        )
    return JUNK | st.sampled_from(ENDINGS).map(lambda end: f"{good}{end}")


SERVICES = st.one_of(
    st.just({"tts": GOOD_SERVICE}),
    spoilt({"tts": GOOD_SERVICE}),
    spoilt({"tts": GOOD_SERVICE, "clone": service()}),
    JUNK,
)
HOSTS = st.one_of(
    st.sampled_from([{"gpus": GOOD_HOST["gpus"]}, {"gpu_count": 1}]),
    spoilt({name: GOOD_HOST[name] for name in ("ansible_host", "gpus")}),
    spoilt({name: GOOD_HOST[name] for name in ("ansible_host", "gpu_count")}),
    st.dictionaries(st.sampled_from(["gpu_count", "gpus", "ansible_host", "fleet_address", "gpu_cuont"]), JUNK),
)
PLAIN = re.compile(r"[!-~]+", re.ASCII)
"""What may stand in a configuration file without changing its meaning there."""


@settings(max_examples=300)
@given(SERVICES, HOSTS, HOSTS, st.just(CONDA_ENVS) | JUNK, st.sampled_from([9999, 12421]) | JUNK)
@example({"tts": GOOD_SERVICE}, {"gpu_count": 1}, {"gpus": GOOD_HOST["gpus"]}, CONDA_ENVS, 9999)
def test_any_inventory_is_refused_or_means_a_consistent_fleet(services, first, second, conda_envs, port):
    hosts = {"gpu01": first, "gpu02": second, "gateway": {"ansible_host": "10.0.0.100"}}
    groups = {"gpu_servers": ["gpu01", "gpu02"], "gateways": ["gateway"]}
    assert_refused_or_consistent(derive(services, groups, hosts, conda_envs=conda_envs, port=port))


def assert_refused_or_consistent(fleet):
    for fault in fleet["faults"]:
        assert fault and "\n" not in fault
    if fleet["faults"]:
        return
    json.dumps(fleet["instances"])
    assert fleet["capacity"] == sum(instance["slots"] for instance in fleet["instances"]) > 0
    assert 0 < fleet["port"] < 65536
    for keys in (("id",), ("socket",), ("host", "port"), ("host", "program")):
        assert len({tuple(one[key] for key in keys) for one in fleet["instances"]}) == len(fleet["instances"])
    for instance in fleet["instances"]:
        assert 1024 <= instance["port"] < 65536
        for key in ("id", "address", "device", "program", "socket"):
            assert PLAIN.fullmatch(instance[key]), key
    for service in fleet["services"].values():
        assert (
            PLAIN.fullmatch(service["name"]) and PLAIN.fullmatch(service["route"]) and PLAIN.fullmatch(service["app"])
        )
        assert all(PLAIN.fullmatch(package) for package in service["packages"])
        assert all(
            PLAIN.fullmatch(name) and not unsupported_environment(v) for name, v in service["environment"].items()
        )
        assert not service["smoke"] or PLAIN.fullmatch(service["smoke"]["path"])


def test_what_the_fuzz_spoils_is_good():
    """Else everything above would be refused for a reason of its own."""
    assert fleet_of({"gpu01": {"gpu_count": 1}}, {"tts": GOOD_SERVICE})["faults"] == []


@pytest.mark.parametrize(
    "services",
    [
        {"tts": service(environment=["TOKEN=hunter2"])},
        {"tts": service(environment={"TOKEN": ["hunter2"]})},
        {"tts": service(environment={"TOKEN": "hunter2\n"})},
        {"tts": service(enviroment={"TOKEN": "hunter2"})},
        {"tts": service(TOKEN="hunter2")},
        {"tts": service(smoke={"path": "x", "headers": "Bearer hunter2"})},
        {"tts": ["hunter2"]},
        ["hunter2"],
        {"tts": service(code="https://me:hunter2@example.org/x.git")},
        {"tts": service(code={"source": "https://hunter2@example.org/x.git", "version": "1"})},
        {"tts": service(code={"source": "ssh://me:hunter2@example.org/x.git", "version": "1"})},
    ],
)
def test_a_refusal_shows_no_secret(services):
    faults = fleet_of({"gpu01": {"gpu_count": 1}}, services)["faults"]
    assert len(faults) == 1
    assert "(hidden)" in faults[0] and "hunter2" not in faults[0]


@pytest.mark.parametrize(
    "source", ["git@example.org:x.git", "ssh://git@example.org/x.git", "https://example.org/a@b.git"]
)
def test_a_user_of_ssh_is_no_credential(source):
    assert (
        fleet_of({"gpu01": {"gpu_count": 1}}, {"tts": service(code={"source": source, "version": "1"})})["faults"] == []
    )


def endings(good):
    """A good value with each of the endings behind each of its texts and numbers, one at a time."""
    if isinstance(good, dict):
        for name, value in good.items():
            yield from ({**good, name: one} for one in endings(value))
    elif isinstance(good, list):
        for at, value in enumerate(good):
            yield from ([*good[:at], one, *good[at + 1 :]] for one in endings(value))
    else:
        yield from (f"{good}{end}" for end in ENDINGS)


def test_nothing_hides_behind_the_end_of_a_value():
    for fields in endings(GOOD_SERVICE):
        assert_refused_or_consistent(fleet_of({"gpu01": {"gpu_count": 1}}, {"tts": fields}))
    for variables in endings({"ansible_host": "10.0.0.1", "gpus": GOOD_HOST["gpus"]}):
        assert_refused_or_consistent(fleet_of({"gpu01": variables}))


@pytest.mark.parametrize(("field", "value"), [("route", "/tts/\n"), ("slots", "2\n"), ("slots", "9" * 5000)])
def test_neither_a_line_end_nor_more_digits_than_python_reads_make_a_value(field, value):
    assert len(fleet_of({"gpu01": {"gpu_count": 1}}, {"tts": service(**{field: value})})["faults"]) == 1

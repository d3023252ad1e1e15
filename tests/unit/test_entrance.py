"""Container, TLS and API keys in the derivation, and the tool that makes keys."""

import re
import subprocess
import sys

import pytest
from ansible_collections.gpufleet.core.plugins.module_utils.entrance import hash_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.test_fleet import JUNK, PLAIN, PROJECT, assert_refused_or_consistent, fleet_of, service, spoilt
from tools.apikey import new_key

HASH = hash_of(new_key("alice"))
GOOD = {
    "gateway_tls": {"certificate": "c.pem", "key": "k.pem", "port": 443, "redirect": False, "hsts_seconds": 60},
    "api_keys": {"alice": {"hashes": [HASH], "in_flight": 4, "services": ["tts"]}},
    "gateway_vip": {"address": "10.0.0.9", "interface": "eth0", "router_id": 7},
}
CONTAINER = {"gateway_container": {"base_image": "debian:bookworm", "publish": 9080}}
ACME = {"gateway_tls": {"acme": {"names": ["tts.example.org"], "authority": "https://ca.example.org/directory"}}}


def behind(entrance, **settings):
    """The smallest fleet behind a gateway with these variables."""
    hosts = {"gpu01": {"gpu_count": 1, "ansible_host": "10.0.0.1"}}
    return fleet_of(hosts, {"tts": service()}, gateway=entrance, **settings)


def test_without_either_a_gateway_is_as_it_always_was():
    for entrance in ({}, {"gateway_tls": {}}, {"gateway_tls": None}):
        fleet = behind(entrance)
        assert fleet["faults"] == []
        assert (fleet["tls"], fleet["api_keys"], fleet["ports"], fleet["vip"]) == (None, {}, [9999], None)
        assert fleet["url"] == fleet["gateways"][0]["url"] == "http://10.0.0.100:9999"
        assert fleet["container"] is None
        assert fleet["nginx"]["configuration"] == "/etc/nginx/nginx.conf"
        assert set(fleet["zones"]) == {"instance", "service", "client", "client_work"}


def test_what_is_not_given_has_its_default():
    fleet = behind({"gateway_tls": {"certificate": "c", "key": "k"}, "api_keys": {"alice": {"hashes": [HASH]}}})
    assert fleet["faults"] == []
    assert fleet["tls"] == {"port": 9443, "plain_ports": [9999], "redirect": True, "hsts_seconds": 0, "acme": None}
    digests = {HASH.split(".")[1]: HASH.split(".")[2]}
    assert fleet["api_keys"] == {"alice": {"hashes": digests, "in_flight": None, "services": ["tts"]}}
    assert fleet["gateways"][0]["url"] == "https://10.0.0.100:9443"


@pytest.mark.parametrize(
    ("given", "vip", "url"),
    [
        ({"address": "10.0.0.9"}, ("10.0.0.9", None, 9), "http://10.0.0.9:9999"),
        ({"address": "10.0.4.0"}, ("10.0.4.0", None, 255), "http://10.0.4.0:9999"),
        (GOOD["gateway_vip"], ("10.0.0.9", "eth0", 7), "http://10.0.0.9:9999"),
    ],
)
def test_with_an_address_for_two_gateways_clients_use_that(given, vip, url):
    fleet = behind({"gateway_vip": given})
    assert fleet["faults"] == []
    assert (tuple(fleet["vip"].values()), fleet["url"]) == (vip, url)
    assert fleet["gateways"][0]["url"] == "http://10.0.0.100:9999"
    assert behind({"gateway_vip": given, **ACME})["url"] == url.replace("http", "https").replace("9999", "9443")


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.9", "224.0.0.18", 9, ["10.0.0.9"], "10.0.0.9\n"])
def test_an_address_that_no_host_can_have_is_refused(address):
    (fault,) = behind({"gateway_vip": {"address": address}})["faults"]
    assert "not an IPv4 address" in fault


@pytest.mark.parametrize(
    ("given", "ports"),
    [
        ({**GOOD["gateway_tls"], "port": 9999}, [9999]),
        ({**GOOD["gateway_tls"], "redirect": True}, [9999, 443]),
        (ACME["gateway_tls"], [80, 9999, 9443]),
        ({**ACME["gateway_tls"], "redirect": False}, [80, 9443]),
    ],
)
def test_the_gateway_listens_at_no_other_ports(given, ports):
    fleet = behind({"gateway_tls": given})
    assert (fleet["faults"], fleet["ports"]) == ([], ports)


@pytest.mark.parametrize(
    ("container", "tls", "ports", "url"),
    [
        ({"publish": 9080}, {}, [9080], "http://10.0.0.100:9080"),
        ({}, {}, [9999], "http://10.0.0.100:9999"),
        ({"publish": 9080}, {**GOOD["gateway_tls"], "redirect": True}, [9080, 443], "https://10.0.0.100:443"),
    ],
)
def test_clients_of_a_container_come_to_the_port_that_its_host_publishes(container, tls, ports, url):
    fleet = behind({"gateway_container": {"image": "nginx", **container}, "gateway_tls": tls})
    assert (fleet["faults"], fleet["ports"], fleet["port"]) == ([], ports, 9999)
    assert fleet["gateways"][0]["url"] == url
    assert fleet["nginx"]["configuration"] == "/etc/gpufleet-gateway/nginx.conf"


def test_the_fleet_holds_no_key():
    """It is a fact of every host; certificate and key are read where they are needed."""
    fleet = behind({"gateway_tls": {"certificate": "-----BEGIN C", "key": "-----BEGIN K"}})
    assert fleet["faults"] == []
    assert "BEGIN" not in str(fleet)


def test_each_limit_that_keys_have_is_counted_for_itself():
    hashes = {label: [hash_of(new_key(label))] for label in ("alice", "bob", "carol")}
    limits = {"alice": 4, "bob": 2, "carol": 4}
    fleet = behind({"api_keys": {label: {"hashes": hashes[label], "in_flight": limits[label]} for label in hashes}})
    own = ["label", "label_work", "label_2", "label_2_work", "label_4", "label_4_work"]
    assert list(fleet["zones"]) == ["instance", "service", "client", *own]


@settings(max_examples=200)
@given(
    st.one_of(
        *map(spoilt, (GOOD, ACME, CONTAINER)),
        st.fixed_dictionaries({"gateway_tls": JUNK, "api_keys": JUNK, "gateway_vip": JUNK, "gateway_container": JUNK}),
    )
)
@example(GOOD)
@example(ACME)
@example(CONTAINER)
def test_anything_is_refused_or_can_stand_in_a_configuration(entrance):
    fleet = behind(entrance)
    assert_refused_or_consistent(fleet)
    if fleet["faults"]:
        return
    for label, key in fleet["api_keys"].items():
        assert key["hashes"]
        for text in (label, *key["hashes"], *key["hashes"].values(), *key["services"]):
            assert re.fullmatch(r"[\w-]+", text, re.ASCII)
    vip = fleet["vip"] or {"address": "x", "interface": None, "router_id": 1}
    assert all(PLAIN.fullmatch(text) for text in (vip["address"], vip["interface"] or "x"))
    assert 0 < vip["router_id"] < 256
    acme = (fleet["tls"] or {}).get("acme") or {"names": []}
    container = fleet["container"] or {}
    images = [container[name] for name in ("image", "base_image") if container.get(name)]
    assert all(PLAIN.fullmatch(text) for text in (*acme["names"], acme.get("authority", "x"), *images))


@pytest.mark.parametrize(
    "entrance",
    [
        {"api_keys": "hunter2"},
        {"api_keys": ["hunter2"]},
        {"api_keys": {"alice": "hunter2"}},
        {"api_keys": {"alice": {"hashes": "hunter2"}}},
        {"api_keys": {"alice": {"hashes": ["hunter2"]}}},
        {"api_keys": {"alice": {"hashes": [HASH], "key": "hunter2"}}},
        {"gateway_tls": "hunter2"},
        {"gateway_tls": {"certificate": "c", "key": ["hunter2"]}},
        {"gateway_tls": {"certificate": "c", "key": "k", "password": "hunter2"}},
        {"gateway_tls": {"acme": {"names": ["tts.example.org"]}, "key": "hunter2"}},
    ],
)
def test_a_refusal_shows_no_secret(entrance):
    (fault,) = behind(entrance)["faults"]
    assert "(hidden)" in fault and "hunter2" not in fault


def test_keys_are_long_random_and_never_the_same():
    keys = {new_key("alice") for _ in range(100)}
    assert len({key.split(".")[2] for key in keys}) == 100
    for key in keys:
        assert re.fullmatch(r"alice\.[0-9a-f]{6}\.[A-Za-z0-9_-]{43}", key)
        assert behind({"api_keys": {"alice": {"hashes": [hash_of(key)]}}})["faults"] == []


def test_the_tool_prints_a_key_and_the_hash_that_it_has():
    def run(*arguments):
        command = [sys.executable, "-m", "tools.apikey", *arguments]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)

    said = run("new", "team-a").stdout
    key, shown = re.findall(r"team-a\.\S+", said)
    assert shown == hash_of(key)
    assert said.endswith(f"\napi_keys:\n  team-a:\n    hashes:\n      - {shown}\n")
    refused = run("new", "Team A")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "'Team A' is no label" in refused.stderr

# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""How clients come in, as the inventory describes it: address, container, TLS, API keys, what the gateway counts. Pure.

A key is LABEL.ID.SECRET. The inventory has its hash only, LABEL.ID.DIGEST: with the label a hash that was pasted below
another one is noticed, and with the id nginx knows which of a label's hashes to compare with.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import re
from base64 import urlsafe_b64encode
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ansible_collections.gpufleet.core.plugins.module_utils.faults import HIDDEN, Faults, whole_number

TLS_VARIABLE, KEYS_VARIABLE, VIP_VARIABLE = "gateway_tls", "api_keys", "gateway_vip"
CONTAINER_VARIABLE = "gateway_container"
ABSENT = object()

#: The fields of gateway_tls and their defaults: either certificate and key, or acme.
TLS_FIELDS: dict[str, Any] = {
    "certificate": None,
    "key": None,
    "acme": None,
    "port": 9443,
    "redirect": True,
    "hsts_seconds": 0,
}
ACME_FIELDS = ("names", "authority")
LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
ACME_PORT = 80  # RFC 8555, 8.3: there the certificate authority looks for the answer to its challenge
KEY_FIELDS = ("hashes", "in_flight", "services")
VIP_FIELDS = ("address", "interface", "router_id")
#: The fields of gateway_container and their defaults: either image or base_image.
CONTAINER_FIELDS: dict[str, Any] = {"image": None, "base_image": None, "publish": None}
#: Where nginx has its files on a gateway; in a container under the same paths, beside which the host may have its own.
NATIVE_NGINX = {
    "configuration": "/etc/nginx/nginx.conf",
    "pid_file": "/run/nginx.pid",
    "log_directory": "/var/log/nginx",
}
CONTAINER_NGINX = {
    "configuration": "/etc/gpufleet-gateway/nginx.conf",
    "pid_file": "/run/gpufleet-gateway/nginx.pid",
    "log_directory": "/var/log/gpufleet-gateway",
}

# To be matched in full, as in module_utils.fleet.
_LABEL = r"[a-z](?:[a-z0-9_-]{0,30}[a-z0-9])?"
_ID = r"[0-9a-f]{6}"
_SECRET = r"[A-Za-z0-9_-]{43}"  # 256 bits in base64url
_DIGEST = r"[A-Za-z0-9_-]{21}[AQgw]"  # 128 bits
_KEY = re.compile(rf"(?:Bearer )?{_LABEL}\.{_ID}\.{_SECRET}")
_HASH = re.compile(rf"(?P<label>{_LABEL})\.(?P<id>{_ID})\.(?P<digest>{_DIGEST})")
_HOST_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]")
_URL = re.compile(r"https://[A-Za-z0-9._~:/\[\]-]+")
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._/:@-]*")


def hash_of(key: str) -> str:
    """Return what the inventory has of a key. nginx takes the MD5 of the header that clients send, and so do we."""
    digest = hashlib.md5(f"Bearer {key}".encode(), usedforsecurity=False).digest()
    return f"{key.rpartition('.')[0]}.{urlsafe_b64encode(digest).decode().rstrip('=')}"


def is_label(text: str) -> bool:
    """Tell whether a text can be the label of a key: it stands in logs and in nginx's configuration."""
    return re.fullmatch(_LABEL, text) is not None


def of_gateways(variable: str, hosts: Iterable[str], hostvars: Mapping[str, Mapping[str, Any]], faults: Faults) -> Any:
    """The value that a variable has on the gateways: one for all of them, since any of them may be asked. Or ABSENT."""
    values = {host: hostvars[host].get(variable, ABSENT) for host in hosts}
    first = next(iter(values), "")
    for host, value in values.items():
        if value != values[first]:
            remedy = "Give it once, in the group_vars of the gateways or of all"
            faults.add(f"host {host}", variable, HIDDEN, f"another one than on {first}", remedy)
    return values.get(first, ABSENT)


def _is_mapping(
    given: Any, variable: str, fields: Collection[str], remedy: str, faults: Faults, *, hidden: bool = False
) -> bool:
    """Tell whether a value is a mapping, and refuse it if not; or else what it has besides its fields."""
    if not isinstance(given, Mapping):
        faults.add("all", variable, HIDDEN if hidden else given, "not a mapping", remedy)
        return False
    for name in set(given) - set(fields):
        faults.unknown_key("all", f"{variable}.", name, given[name], fields)
    return True


def vip(
    given: Any, gateways: Iterable[Mapping[str, str]], owners: Mapping[Any, str], faults: Faults
) -> dict[str, Any] | None:
    """The address that one of the gateways has at a time, or None where each has its own alone.

    ``interface`` is None where it is the one with the gateway's own address. ``router_id`` tells groups of gateways on
    one network apart; made from the address, it is another one for each group.

    :param owners: the hosts by the addresses that they have already.
    """
    if given is ABSENT or given is None or given == {}:
        return None
    if not _is_mapping(given, VIP_VARIABLE, VIP_FIELDS, "Give {address: IP ADDRESS}", faults):
        return None
    address, interface, router_id = (given.get(name) for name in VIP_FIELDS)
    ip, variable = _ipv4(address), f"{VIP_VARIABLE}.address"
    if ip is None or ip.is_unspecified or ip.is_loopback or ip.is_multicast:
        problem = "not an IPv4 address that a host can have, and gateways listen at no others"
        faults.add("all", variable, address, problem, "Give one of the gateways' network that no host has")
    elif address in owners:
        faults.add("all", variable, address, f"the address of {owners[address]} too", "Give one that no host has")
    for gateway in gateways:
        if _ipv4(gateway["address"]) is None:
            problem = "not an IPv4 address, as gateways with a gateway_vip need one on its network"
            remedy = "Give the one from which it reaches the GPU servers"
            faults.add(f"host {gateway['host']}", "fleet_address", gateway["address"], problem, remedy)
    if interface is not None and not (isinstance(interface, str) and _INTERFACE.fullmatch(interface)):
        remedy = "Leave it out where it is the one with the gateways' own addresses"
        faults.add("all", f"{VIP_VARIABLE}.interface", interface, "not the name of a network interface", remedy)
    if router_id is None:
        router_id = int(ip or 0) % 256 or 255
    else:
        remedy = "Leave it out, or give one that no other VRRP router of the network has"
        router_id = whole_number(router_id, 1, 255, faults, "all", f"{VIP_VARIABLE}.router_id", remedy)
    return {"address": str(ip), "interface": interface, "router_id": router_id}


def _ipv4(text: Any) -> ipaddress.IPv4Address | None:
    try:
        return ipaddress.IPv4Address(text) if isinstance(text, str) else None
    except ValueError:
        return None


def tls(given: Any, port: int, gateways: int, faults: Faults) -> dict[str, Any] | None:
    """What clients find at the ports of so many gateways, or None for plain HTTP: ``port`` is that of plain HTTP.

    ``plain_ports`` are listened at besides TLS, for redirects and for challenges. Of certificate and key only whether
    they are given is looked at: their contents are read, and judged, where they are needed.
    """
    if given is ABSENT or given is None or given == {}:
        return None
    if not _is_mapping(given, TLS_VARIABLE, TLS_FIELDS, "Give {certificate: FILE, key: FILE}", faults, hidden=True):
        return None
    wanted = {name: default if given.get(name) is None else given[name] for name, default in TLS_FIELDS.items()}
    for name, low, high, remedy in (
        ("port", 1, 65535, "Give the TCP port of TLS"),
        ("hsts_seconds", 0, 63_072_000, "Give the seconds for which browsers use nothing but TLS"),
    ):
        number = whole_number(wanted[name], low, high, faults, "all", f"{TLS_VARIABLE}.{name}", remedy)
        wanted[name] = TLS_FIELDS[name] if number is None else number
    if not isinstance(wanted["redirect"], bool):
        remedy = "Write true, or false for no plain HTTP at all"
        faults.add("all", f"{TLS_VARIABLE}.redirect", wanted["redirect"], "neither true nor false", remedy)
    acme = None if wanted["acme"] is None else _acme(wanted["acme"], faults)
    if acme is not None and gateways > 1:
        problem = f"there are {gateways} gateways, and only one of them would be asked for the answer to a challenge"
        faults.add("all", f"{TLS_VARIABLE}.acme", acme["names"], problem, "Give certificate and key")
    own = [name for name in ("certificate", "key") if wanted[name] is not None]
    if acme is not None and own:
        problem = "the certificate comes from acme, and this one would be ignored"
        faults.add("all", f"{TLS_VARIABLE}.{own[0]}", HIDDEN, problem, "Give either acme or certificate and key")
    elif wanted["acme"] is None:
        for name in ("certificate", "key"):
            _refuse_no_text(wanted[name], f"{TLS_VARIABLE}.{name}", faults)
    plain_ports = ({port} if wanted["redirect"] else set()) | (set() if acme is None else {ACME_PORT})
    if wanted["port"] in plain_ports:
        problem = "plain HTTP is listened for at this port"
        faults.add("all", f"{TLS_VARIABLE}.port", wanted["port"], problem, "Give TLS a port of its own")
    return {
        "port": wanted["port"],
        "plain_ports": sorted(plain_ports),
        "redirect": wanted["redirect"],
        "hsts_seconds": wanted["hsts_seconds"],
        "acme": acme,
    }


def container(
    given: Any, port: int, tls: Mapping[str, Any] | None, monitored: bool, serving: Iterable[str], faults: Faults
) -> dict[str, Any] | None:
    """The container that nginx runs in, or None where it runs natively.

    It is in the host's own network unless `publish` is given: then that port of the host leads to ``port``, that of
    plain HTTP, and all others are the same inside and outside.

    :param serving: the gateways that have GPUs of their own.
    """
    if given is ABSENT or given is None:
        return None
    remedy = "Give {base_image: IMAGE} or {image: IMAGE}"
    if not _is_mapping(given, CONTAINER_VARIABLE, CONTAINER_FIELDS, remedy, faults):
        return None
    images = {name: given[name] for name in ("image", "base_image") if given.get(name) is not None}
    if len(images) != 1:
        problem = "image is given too, and one would be ignored" if images else "neither this nor image"
        remedy = "Give image to run, or base_image to build one from"
        faults.add("all", f"{CONTAINER_VARIABLE}.base_image", images.get("base_image"), problem, remedy)
    for name, image in images.items():
        if not isinstance(image, str) or not _IMAGE.fullmatch(image):
            remedy = "Write it as docker pull takes it"
            faults.add("all", f"{CONTAINER_VARIABLE}.{name}", image, "not the name of an image", remedy)
    if tls is not None and tls["acme"] is not None:
        problem = "the renewal of its certificate would not reach into the container"
        faults.add("all", f"{TLS_VARIABLE}.acme", tls["acme"]["names"], problem, "Give certificate and key")
    publish, variable = given.get("publish"), f"{CONTAINER_VARIABLE}.publish"
    if publish is not None:
        remedy = f"Give the port of the host that leads to {port}"
        publish = whole_number(publish, 1, 65535, faults, "all", variable, remedy)
    if publish is not None and tls is not None and port not in tls["plain_ports"]:
        problem = "nobody listens at fleet_port with gateway_tls.redirect: false"
        faults.add("all", variable, publish, problem, "Leave it out")
    elif publish is not None and tls is not None and publish in {tls["port"], *tls["plain_ports"]} - {port}:
        faults.add("all", variable, publish, "the gateway has this port already", "Give another one")
    if publish is not None and monitored:
        problem = "a container with a network of its own does not reach the exporters of its host"
        faults.add("all", variable, publish, problem, "Leave it out, and clients come to fleet_port")
    for host in serving if publish is not None else ():
        problem = f"a container with a network of its own does not reach the GPUs of its host, and {host} has some"
        faults.add("all", variable, publish, problem, "Leave it out, and clients come to fleet_port")
    return {"image": images.get("image"), "base_image": images.get("base_image"), "publish": publish}


def _refuse_no_text(value: Any, variable: str, faults: Faults) -> None:
    if not isinstance(value, str) or not value.strip():
        shown = None if value is None else HIDDEN
        faults.add("all", variable, shown, "required", "Give a file on the controller, or its text in PEM")


def _acme(given: Any, faults: Faults) -> dict[str, Any]:
    variable = f"{TLS_VARIABLE}.acme"
    if not _is_mapping(given, variable, ACME_FIELDS, "Give {names: [HOST NAME]}", faults):
        return {"names": [], "authority": LETS_ENCRYPT}
    names = given.get("names")
    if not isinstance(names, (list, tuple)) or not names:
        faults.add("all", f"{variable}.names", names, "not a list of host names", "List those that clients use")
        names = []
    for name in names:
        if not isinstance(name, str) or not _HOST_NAME.fullmatch(name):
            problem = "not a host name for which a certificate can be had over HTTP"
            faults.add("all", f"{variable}.names", name, problem, "Write it whole, in small letters, without *")
    authority = given.get("authority")
    if authority is not None and not (isinstance(authority, str) and _URL.fullmatch(authority)):
        problem = "not the https:// URL of an ACME directory"
        faults.add("all", f"{variable}.authority", authority, problem, "Leave it out for Let's Encrypt")
    return {"names": [str(name) for name in names], "authority": authority or LETS_ENCRYPT}


def api_keys(given: Any, services: Iterable[str], faults: Faults) -> dict[str, dict[str, Any]]:
    """The keys by label, each with its hashes by id, in_flight (or None) and the services that it opens.

    No keys mean that everybody is let in, so this must be said by leaving the variable out: what is empty is refused.
    """
    if given is ABSENT:
        return {}
    if not isinstance(given, Mapping) or not given:
        shown = HIDDEN if given else given
        remedy = f"Give {{LABEL: {{hashes: [HASH]}}}}; without {KEYS_VARIABLE} everybody is let in"
        faults.add("all", KEYS_VARIABLE, shown, "there is no key", remedy)
        return {}
    keys = {}
    for label, entry in given.items():
        if not isinstance(label, str) or not is_label(label):
            remedy = "Use a-z, 0-9, _ and -, 32 at most, and begin with a letter"
            faults.add("all", f"{KEYS_VARIABLE}, label", label, "not usable in logs and headers", remedy)
        elif _is_mapping(entry, f"{KEYS_VARIABLE}.{label}", KEY_FIELDS, "Give {hashes: [HASH]}", faults, hidden=True):
            keys[label] = _api_key(label, entry, sorted(services), faults)
    return keys


def _api_key(label: str, given: Mapping[str, Any], services: list[str], faults: Faults) -> dict[str, Any]:
    variable = f"{KEYS_VARIABLE}.{label}"
    in_flight = given.get("in_flight")
    if in_flight is not None:
        remedy = "Give the concurrent requests of all its holders"
        in_flight = whole_number(in_flight, 1, 1_000_000, faults, "all", f"{variable}.in_flight", remedy)
    wanted = given.get("services")
    if wanted is None:
        wanted = services
    elif not isinstance(wanted, (list, tuple)) or not wanted:
        faults.add("all", f"{variable}.services", wanted, "not a list of services", "Leave it out for all of them")
        wanted = []
    for name in wanted:
        if name not in services:
            close = difflib.get_close_matches(str(name), services, n=1)
            remedy = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(services)}"
            faults.add("all", f"{variable}.services", name, "there is no such service", remedy)
    return {
        "hashes": _hashes(label, given.get("hashes"), faults),
        "in_flight": in_flight,
        "services": sorted(set(map(str, wanted))),
    }


def _hashes(label: str, given: Any, faults: Faults) -> dict[str, str]:
    """Digests by id. A refusal shows none of what was given: it may be the key itself."""
    variable = f"{KEYS_VARIABLE}.{label}.hashes"
    make = f"Make a key with python -m tools.apikey new {label}"
    if not isinstance(given, (list, tuple)) or not given:
        faults.add("all", variable, HIDDEN if given else given, "not a list of hashes", make)
        return {}
    digests: dict[str, str] = {}
    for text in given:
        found = _HASH.fullmatch(text) if isinstance(text, str) else None
        if isinstance(text, str) and _KEY.fullmatch(text):
            problem = "a key itself and no hash, so whoever reads the inventory has it"
            faults.add("all", variable, HIDDEN, problem, f"{make}, and give its hash")
        elif not found:
            problem = "not the hash of a long random key: passwords and other hashes can be guessed"
            faults.add("all", variable, HIDDEN, problem, make)
        elif found["label"] != label:
            faults.add("all", variable, HIDDEN, f"the hash of a key of {found['label']}", make)
        elif found["id"] in digests:
            faults.add("all", variable, f"{label}.{found['id']}.…", "listed twice", "List every hash once")
        else:
            digests[found["id"]] = found["digest"]
    return digests


def zones(keys: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What nginx counts: by the name of each of its zones the expression whose values are told apart in it.

    A client is its address, or where a service asks for keys the label of one. ``work`` is what GPUs do for a client,
    who may have gone. A limit of nginx's is a number that does not vary, so each that keys have needs zones of its own.
    """
    known = {"instance": "$server_name", "service": "$service", "client": "$service$binary_remote_addr"}
    if not keys:
        return {**known, "client_work": "$service$http_x_real_ip"}
    labels = {"label": "$service/$client", "label_work": "$service/$http_x_gpufleet_client"}
    for number in sorted({key["in_flight"] for key in keys.values()} - {None}):
        labels |= {f"label_{number}": f"$label_{number}", f"label_{number}_work": f"$label_{number}_work"}
    return known | labels

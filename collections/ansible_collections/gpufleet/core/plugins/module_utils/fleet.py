# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""The fleet as the inventory describes it: one pure derivation that everything else reads.

Ports, programs, upstreams, limits, tests and tables all come from :func:`derive`. It looks at inventory variables
only, never at facts, so neither ``--limit`` nor a dead host can change what the gateway serves.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ansible_collections.gpufleet.core.plugins.module_utils import entrance
from ansible_collections.gpufleet.core.plugins.module_utils.faults import HIDDEN, Faults, whole_number
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import unsupported_environment

RUN_DIRECTORY = "/run/gpufleet-gateway"  # the unix sockets of the gateway's inner servers
STATE_DIRECTORY = "/var/lib/gpufleet-gateway"  # what a gateway keeps besides nginx: flags, the lock, the audit log
DRAIN_DIRECTORY = f"{STATE_DIRECTORY}/drain"  # a file named after an instance keeps new requests away from it
DOWN_DIRECTORY = "/run/gpufleet-agent/down"  # likewise, but raised and cleared by the gateway's agent
ACME_DIRECTORY = f"{STATE_DIRECTORY}/acme"  # answers to a certificate authority, and links to what it issued
AGENT_SOCKET = "/run/gpufleet-agent/http.sock"  # where the agent tells the state of the cluster
PAGE_DIRECTORY = "/opt/gpufleet/fleet-agent/current/page"  # of the agent's release: the page that shows it
#: TCP ports of what monitoring brings, the programs' own defaults; `nginx_status` is what the exporter of nginx asks.
MONITORING_PORTS = {
    "node": 9100,
    "nginx": 9113,
    "nginx_status": 9112,
    "requests": 3903,
    "prometheus": 9090,
    "probe": 9115,
    "alertmanager": 9093,
}
SOCKET_PATH_MAX = 107  # sizeof(sockaddr_un.sun_path) - 1, unix(7)
DEFAULT_PORT = 9999
DRAIN_MARGIN = 15  # seconds beyond its time limit in which a request has certainly left a GPU
REQUIRED = object()

#: Every field of a service and its default. A field that is not here is a typing error and refused.
SERVICE_FIELDS: dict[str, Any] = {
    "route": REQUIRED,
    "app": REQUIRED,
    "code": REQUIRED,
    "conda_env": REQUIRED,
    "packages": (),
    "environment": {},
    "group": None,  # all GPU servers
    "base_port": 12321,
    "slots": 2,
    "queue": 0,
    "queue_timeout_seconds": 5,
    "client_limit": 6,
    "time_limit_seconds": 300,
    "body_limit_megabytes": 100,
    "failure_limit": 3,
    "memory_limit_megabytes": None,  # none, as for the two below
    "recycle_after_requests": None,
    "recycle_after_seconds": None,
    "smoke": None,  # none
}
SMOKE_FIELDS = ("path", "body", "content_type")
CODE_FIELDS = ("source", "version")
GPU_FIELDS = ("device", "slots", "index")
HOST_VARIABLES = ("gpu_count", "gpus")
ADDRESS_VARIABLES = ("fleet_address", "ansible_host")
#: Set by gpufleet for each program; a service that set them too would undo its own placement or limits.
RESERVED_ENVIRONMENT = re.compile(r"CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|PYTHONUNBUFFERED|SLOT_GUARD_\w*")
#: Paths the gateway keeps for itself; `/_…` also holds the guard's admin endpoints.
RESERVED_ROUTES = ("/_", "/health", "/cluster")

# To be matched in full: a `$` would let a line end through, and so another line into a configuration file.
_SERVICE_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_ROUTE = re.compile(r"/(?:[A-Za-z0-9._~-]+/)*")
_APP = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[?[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*\]?")
_SMOKE_PATH = re.compile(r"(?!/)[A-Za-z0-9._~%!$&()*+,;=:@/?-]*")
_CONTENT_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(?:; ?[\w-]+=[\w.-]+)?", re.ASCII)
_DEVICE_INDEX = re.compile(r"[0-9]{1,4}")
_DEVICE_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z/-]+")
_GIT_SOURCE = re.compile(r"(?:[a-z+]+://|[\w.-]+@[\w.-]+:)")
_CREDENTIAL = re.compile(r"https?://[^/]*@|[a-z+]+://[^/@]*:[^/]*@")

GATEWAY_BY_IP = (
    "a name, and the guards know their gateways by address",
    "Give the IP address from which the gateway reaches the GPU servers",
)
MONITORING_BY_IP = (
    "a name, and metrics are told to addresses",
    "Give the IP address from which Prometheus reaches the others",
)


def derive(
    services: Any,
    groups: Mapping[str, list[str]],
    hostvars: Mapping[str, Mapping[str, Any]],
    conda_envs: Any = None,
    gpu_group: str = "gpu_servers",
    gateway_group: str = "gateways",
    port: Any = DEFAULT_PORT,
    monitoring_group: str = "monitoring",
) -> dict[str, Any]:
    """Derive the fleet from inventory variables.

    :param services: services by name, fields as in :data:`SERVICE_FIELDS`.
    :param groups: Ansible's ``groups``: host names by group name.
    :param hostvars: Ansible's ``hostvars``; read are ``gpu_count``, ``gpus``, ``fleet_address`` and ``ansible_host``,
        of the gateways ``gateway_tls``, ``api_keys``, ``gateway_vip`` and ``gateway_container``.
    :param conda_envs: conda environments by name, each with the folder of its ``lock``.
    :param gpu_group: the group of the GPU servers.
    :param gateway_group: the group of the gateways.
    :param port: TCP port that the gateway serves; with TLS, that of plain HTTP.
    :param monitoring_group: the group of the hosts with Prometheus, which may be empty or not there.
    :returns: ``instances`` (one per service and GPU, sorted by service, host and GPU), ``services``, ``hosts`` and
        ``gateways`` with their capacities in concurrent requests, ``monitoring``, how clients come in (``url``,
        ``vip`` or None, ``ports``, ``tls`` or None, ``api_keys``), the gateways' ``container`` or None, where ``nginx``
        has its files, ``drain_seconds`` after which nothing is left of any request on a GPU that gets no new ones, and
        ``faults``. With faults the rest is a best effort that must not be rolled out.
    """
    faults = Faults()
    gateways = _known_by_ip(groups, hostvars, gateway_group, GATEWAY_BY_IP, faults)
    if not gateways:
        faults.add("inventory", f"group {gateway_group}", [], "there is no gateway", "Put the gateway's host into it")
    monitoring = _known_by_ip(groups, hostvars, monitoring_group, MONITORING_BY_IP, faults)
    port = whole_number(port, 1, 65535, faults, "all", "fleet_port", "Give the gateway's TCP port") or DEFAULT_PORT
    given_tls, given_keys, given_vip, given_container = (
        entrance.of_gateways(variable, [gateway["host"] for gateway in gateways], hostvars, faults)
        for variable in (
            entrance.TLS_VARIABLE,
            entrance.KEYS_VARIABLE,
            entrance.VIP_VARIABLE,
            entrance.CONTAINER_VARIABLE,
        )
    )
    serving = [gateway["host"] for gateway in gateways if gateway["host"] in groups.get(gpu_group, ())]
    tls = entrance.tls(given_tls, port, len(gateways), faults)
    container = entrance.container(given_container, port, tls, bool(monitoring), serving, faults)
    published = container["publish"] if container and container["publish"] else port
    ports = [published] if tls is None else [*(published if p == port else p for p in tls["plain_ports"]), tls["port"]]
    members = {*groups.get(gpu_group, ()), *(entry["host"] for entry in (*gateways, *monitoring))}
    owners = {str(hostvars[host].get(name)): host for host in sorted(members) for name in ADDRESS_VARIABLES}
    vip = entrance.vip(given_vip, gateways, owners, faults)
    for gateway in gateways:
        gateway["url"] = _url(gateway["address"], ports[-1], tls is not None)
    gpus = {host: _gpus(host, hostvars[host], faults) for host in sorted(groups.get(gpu_group, ()))}
    if not gpus:
        faults.add("inventory", f"group {gpu_group}", [], "there are no GPU servers", "Put at least one host into it")
    _refuse_shared_uuids(gpus, faults)
    known_services = _services(services, conda_envs, groups, gpu_group, faults)
    addresses = {host: _address(host, hostvars[host], faults) for host in gpus}
    _refuse_shared_addresses(addresses, faults)

    instances = [
        _instance(name, service, host, addresses[host], gpu)
        for name, service in sorted(known_services.items())
        for host in sorted(set(groups.get(service["group"], ())) & set(gpus))
        for gpu in gpus[host]
    ]
    listened = {**dict.fromkeys(ports, "fleet_port"), **({} if tls is None else {tls["port"]: "gateway_tls.port"})}
    if published != port:
        listened[published] = "gateway_container.publish"
    _refuse_collisions(instances, gateways, listened, _monitoring_listeners(gpus, gateways, monitoring), faults)
    api_keys = entrance.api_keys(given_keys, known_services, faults)
    for name, service in known_services.items():
        own = [instance for instance in instances if instance["service"] == name]
        service["capacity"] = sum(instance["slots"] for instance in own)
        service["places"] = service["queue"] * len(own)
        _check_client_limit(service, set(groups.get(service["group"], ())), faults)
    hosts = {
        host: {
            "address": addresses[host],
            "capacity": sum(instance["slots"] for instance in instances if instance["host"] == host),
        }
        for host in gpus
    }
    return {
        "instances": instances,
        "services": known_services,
        "hosts": hosts,
        "gateways": gateways,
        "vip": vip,
        "url": _url(vip["address"], ports[-1], tls is not None) if vip else gateways[0]["url"] if gateways else "",
        "monitoring": monitoring,
        "monitoring_ports": MONITORING_PORTS,
        "port": port,
        "ports": ports,
        "tls": tls,
        "api_keys": api_keys,
        "container": container,
        "nginx": entrance.NATIVE_NGINX if container is None else entrance.CONTAINER_NGINX,
        "zones": entrance.zones(api_keys),
        "run_directory": RUN_DIRECTORY,
        "state_directory": STATE_DIRECTORY,
        "drain_directory": DRAIN_DIRECTORY,
        "down_directory": DOWN_DIRECTORY,
        "agent_socket": AGENT_SOCKET,
        "page_directory": PAGE_DIRECTORY,
        "acme_directory": ACME_DIRECTORY,
        "capacity": sum(instance["slots"] for instance in instances),
        "drain_seconds": max((one["time_limit_seconds"] for one in known_services.values()), default=0) + DRAIN_MARGIN,
        "faults": faults.lines,
    }


def _url(address: str, port: int, secure: bool) -> str:
    return f"{'https' if secure else 'http'}://{address}:{port}"


def _instance(name: str, service: Mapping[str, Any], host: str, address: str, gpu: Mapping[str, Any]) -> dict[str, Any]:
    identifier = f"{name}-{host}-{gpu['index']}"
    return {
        "id": identifier,
        "service": name,
        "host": host,
        "gpu": gpu["index"],
        "device": gpu["device"],
        "address": address,
        "port": service["base_port"] + gpu["index"],
        "slots": gpu["slots"] or service["slots"],
        "program": f"gpufleet-{name}-{gpu['index']}",
        "socket": f"{RUN_DIRECTORY}/{identifier}.sock",
    }


def _check_client_limit(service: Mapping[str, Any], hosts: set[str], faults: Faults) -> None:
    if not service["capacity"] or faults.places & {f"host {host}" for host in hosts}:
        return  # the capacity is not known yet; why has been named
    most = service["capacity"] + service["places"]
    if service["client_limit"] > most:
        requests = "concurrent and waiting requests" if service["places"] else "concurrent requests"
        problem = f"one client would be allowed more than the cluster's {most} {requests}"
        faults.add(
            f"service {service['name']}", "client_limit", service["client_limit"], problem, f"Set it to {most} or less"
        )


def _known_by_ip(
    groups: Mapping[str, list[str]],
    hostvars: Mapping[str, Mapping[str, Any]],
    group: str,
    why: tuple[str, str],
    faults: Faults,
) -> list[dict[str, str]]:
    """The hosts of a group whose connections others let in by IP address; ``why`` is that, and what to give."""
    hosts = [
        {"host": host, "address": _address(host, hostvars[host], faults)} for host in sorted(groups.get(group, ()))
    ]
    problem, remedy = why
    for host in hosts:
        if not _ip(host["address"]) and f"host {host['host']}" not in faults.places:
            faults.add(f"host {host['host']}", "fleet_address", host["address"], problem, remedy)
    return hosts


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        return None


def _address(host: str, variables: Mapping[str, Any], faults: Faults) -> str:
    """Where the gateway reaches a host: ``fleet_address``, else ``ansible_host``, else its name."""
    variable = next((name for name in ADDRESS_VARIABLES if variables.get(name) is not None), None)
    address = variables[variable] if variable else host
    if variable and not (isinstance(address, str) and _ADDRESS.fullmatch(address)):
        faults.add(f"host {host}", variable, address, "not an address or host name", "Give an IP address")
    ip = _ip(str(address))
    return f"[{ip}]" if ip and ip.version == 6 else str(address)  # as URLs and nginx write it


def _gpus(host: str, variables: Mapping[str, Any], faults: Faults) -> list[dict[str, Any]]:
    """A host's GPUs as ``{index, device, slots}``; ``slots`` is None where the service's own number holds.

    The index gives the port, so it follows the card, not its place in the list: leaving a broken card out moves none
    of the others.
    """
    where = f"host {host}"
    for variable in variables:
        if re.match(r"^gpu(?:_|s|c|$)", variable) and variable not in HOST_VARIABLES and "_workers" not in variable:
            faults.unknown_key(where, "", variable, variables[variable], HOST_VARIABLES)
    count, cards = variables.get("gpu_count"), variables.get("gpus")
    if (count is None) == (cards is None):
        problem = "the number of GPUs is not known" if count is None else "gpus is given too, and one would be ignored"
        faults.add(where, "gpu_count", count, problem, "Give either gpu_count or gpus")
        return []
    if cards is None:
        count = whole_number(count, 1, 1024, faults, where, "gpu_count", "Give the number of cards nvidia-smi -L lists")
        return [{"index": index, "device": str(index), "slots": None} for index in range(count or 0)]
    if not isinstance(cards, (list, tuple)) or not cards:
        faults.add(where, "gpus", cards, "not a list of GPUs", "List device indices, UUIDs or {device, slots, index}")
        return []
    gpus = [gpu for place, card in enumerate(cards) if (gpu := _gpu(where, place, card, faults))]
    by_device: dict[str, dict[str, Any]] = {}
    by_index: dict[int, dict[str, Any]] = {}
    for gpu in gpus:
        if by_device.setdefault(gpu["device"], gpu) is not gpu:
            faults.add(where, "gpus, device", gpu["device"], "listed twice", "List every card once")
        elif by_index.setdefault(gpu["index"], gpu) is not gpu:
            remedy = "Give the cards with UUIDs an index of their own"
            faults.add(where, "gpus, index", gpu["index"], "the index, and so the port, of two cards", remedy)
    return sorted(by_index.values(), key=lambda gpu: gpu["index"])


def _gpu(where: str, place: int, card: Any, faults: Faults) -> dict[str, Any] | None:
    variable = f"gpus[{place}]"
    entry = dict(card) if isinstance(card, Mapping) else {"device": card}
    for key in set(entry) - set(GPU_FIELDS):
        faults.unknown_key(where, f"{variable}.", key, entry[key], GPU_FIELDS)
    given = entry.get("device")
    is_index = not isinstance(given, bool) and _DEVICE_INDEX.fullmatch(str(given))
    device = str(int(str(given))) if is_index else str(given)
    if not is_index and not _DEVICE_UUID.fullmatch(device):
        faults.add(
            where,
            f"{variable}.device",
            given,
            "neither a device index nor a UUID",
            "Give an index such as 0 or a UUID such as GPU-… or MIG-…, as nvidia-smi -L prints it",
        )
        return None
    slots, index = entry.get("slots"), entry.get("index", int(device) if is_index else place)
    if slots is not None:
        slots = whole_number(slots, 1, 1024, faults, where, f"{variable}.slots", "Leave a card that must not serve out")
    index = whole_number(index, 0, 1023, faults, where, f"{variable}.index", "Give the card's own small number")
    return None if index is None else {"index": index, "device": device, "slots": slots}


def _services(
    services: Any, conda_envs: Any, groups: Mapping[str, list[str]], gpu_group: str, faults: Faults
) -> dict[str, dict[str, Any]]:
    if not isinstance(services, Mapping) or not services:
        shown = HIDDEN if services else services
        faults.add("all", "services", shown, "no service is defined", "Define at least one in group_vars/all.yml")
        return {}
    known: dict[str, dict[str, Any]] = {}
    for name, given in services.items():
        where = f"service {name}"
        if not _SERVICE_NAME.fullmatch(str(name)):
            faults.add(where, "name", name, "not usable in file and program names", "Use a-z, 0-9 and _, 32 at most")
        elif not isinstance(given, Mapping):
            faults.add(
                where,
                f"services.{name}",
                HIDDEN if given else given,
                "not a mapping",
                "Give route, app, code and conda_env",
            )
        else:
            known[str(name)] = _service(str(name), given, conda_envs, groups, gpu_group, faults)
    _refuse_overlapping_routes(known, faults)
    return known


def _service(
    name: str,
    given: Mapping[str, Any],
    conda_envs: Any,
    groups: Mapping[str, list[str]],
    gpu_group: str,
    faults: Faults,
) -> dict[str, Any]:
    where = f"service {name}"
    for key in set(given) - set(SERVICE_FIELDS):
        faults.unknown_key(where, "", key, given[key], SERVICE_FIELDS)
    service: dict[str, Any] = {"name": name}
    for key, default in SERVICE_FIELDS.items():
        value = given.get(key)
        if value is None and default is REQUIRED:
            faults.add(where, key, None, "required", f"Give services.{name}.{key}")
        service[key] = (None if default is REQUIRED else default) if value is None else value

    _check_text(service, "route", _ROUTE, "must begin and end with /, of plain characters", "Write /…/", faults)
    if str(service["route"]).startswith(RESERVED_ROUTES):
        faults.add(where, "route", service["route"], "kept for the gateway itself", "Choose another path")
    _check_text(service, "app", _APP, "not module:attribute", "Write for instance App_Http_Server:app", faults)
    service["code"] = _code(where, service["code"], faults)
    envs = conda_envs if isinstance(conda_envs, Mapping) else {}
    env = envs.get(str(service["conda_env"]))
    if service["conda_env"] is not None and (not isinstance(env, Mapping) or set(env) != {"lock"}):
        remedy = "Define it under conda_envs with the folder of its lock"
        faults.add(where, "conda_env", service["conda_env"], "no such conda environment", remedy)
    service["packages"] = list(service["packages"]) if isinstance(service["packages"], (list, tuple)) else [None]
    for package in service["packages"]:
        if not isinstance(package, str) or not _PACKAGE.fullmatch(package):
            faults.add(where, "packages", given["packages"], "not a list of package names", "List the names apt knows")
            break
    service["environment"] = _environment(where, service["environment"], faults)
    service["group"] = str(service["group"] or gpu_group)
    _check_group(where, service["group"], groups, gpu_group, faults)
    for key, low, high, remedy in (
        ("base_port", 1024, 65535, "Give the first TCP port of its instances"),
        ("slots", 1, 1024, "Give the concurrent requests one GPU can take"),
        ("queue", 0, 1024, "Give the requests that may wait for one GPU"),
        ("queue_timeout_seconds", 1, 3600, "Give the longest time one request may wait"),
        ("client_limit", 1, 1_000_000, "Give the concurrent requests one client may have"),
        ("time_limit_seconds", 1, 86_400, "Give the longest time one request may take"),
        ("body_limit_megabytes", 1, 102_400, "Give the largest request body"),
        ("failure_limit", 1, 1000, "Give the failed requests in a row after which a GPU is taken out and restarted"),
        ("memory_limit_megabytes", 64, 16_777_216, "Give the memory at which a process is recycled"),
        ("recycle_after_requests", 1, 1_000_000_000, "Give the requests after which a process is recycled"),
        ("recycle_after_seconds", 300, 31_536_000, "Give the time after which a process is recycled"),
    ):
        if service[key] is None:
            continue
        number = whole_number(service[key], low, high, faults, where, key, remedy)
        service[key] = SERVICE_FIELDS[key] if number is None else number
    if service["queue"] and service["queue_timeout_seconds"] >= service["time_limit_seconds"]:
        problem = f"not below the time limit of {service['time_limit_seconds']} s for the whole work"
        remedy = "Give less; who waits longer than others work is better refused"
        faults.add(where, "queue_timeout_seconds", service["queue_timeout_seconds"], problem, remedy)
    service["smoke"] = _smoke(service, faults)
    return service


def _check_text(
    service: Mapping[str, Any], key: str, pattern: re.Pattern[str], problem: str, remedy: str, faults: Faults
) -> None:
    value = service[key]
    if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
        faults.add(f"service {service['name']}", key, value, problem, remedy)


def _code(where: str, code: Any, faults: Faults) -> dict[str, Any]:
    if code is None:
        return {}
    if not isinstance(code, Mapping) or not isinstance(code.get("source"), str) or not code["source"]:
        remedy = "Give {source: FOLDER} or {source: GIT_URL, version: REVISION}"
        faults.add(where, "code", HIDDEN if code else code, "has no source", remedy)
        return {}
    for key in set(code) - set(CODE_FIELDS):
        faults.unknown_key(where, "code.", key, code[key], CODE_FIELDS)
    if _CREDENTIAL.match(code["source"]):
        remedy = "Let git ask a credential helper for it, or use ssh with a key"
        faults.add(
            where, "code.source", HIDDEN, "has a credential in it, which process lists and logs would show", remedy
        )
    if _GIT_SOURCE.match(code["source"]) and not code.get("version"):
        faults.add(where, "code.version", None, "a git source needs a revision", "Give a tag or a commit")
    return dict(code)


def _smoke(service: Mapping[str, Any], faults: Faults) -> dict[str, str] | None:
    """The request that proves a service: its whole path, its body as text and that one's media type.

    A body that is not text is meant as JSON; without a body the request is a GET, else a POST.
    """
    where, given = f"service {service['name']}", service["smoke"]
    if given is None:
        return None
    if not isinstance(given, Mapping):
        faults.add(where, "smoke", given, "not a mapping", "Give {path: PATH, body: …}")
        return None
    for key in set(given) - set(SMOKE_FIELDS):
        faults.unknown_key(where, "smoke.", key, given[key], SMOKE_FIELDS)
    path, body, content_type = (given.get(key) for key in SMOKE_FIELDS)
    if path is None:
        faults.add(where, "smoke.path", None, "required", "Give the path below the route")
    elif not isinstance(path, str) or not _SMOKE_PATH.fullmatch(path):
        problem = "not a path below the route, of the characters of a URL"
        faults.add(where, "smoke.path", path, problem, "Write it without the route and without / in front")
    if content_type is not None and not (isinstance(content_type, str) and _CONTENT_TYPE.fullmatch(content_type)):
        faults.add(where, "smoke.content_type", content_type, "not a media type", "Write for instance text/plain")
    if body is not None and not isinstance(body, str):
        content_type = content_type or "application/json"
        try:
            body = json.dumps(body, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):
            faults.add(where, "smoke.body", body, "cannot be written as JSON", "Quote what is not text or a number")
            body = None
    return {
        "path": f"{service['route']}{path}",
        "body": body or "",
        "content_type": content_type or "text/plain; charset=utf-8",
    }


def _environment(where: str, environment: Any, faults: Faults) -> dict[str, str]:
    if not isinstance(environment, Mapping):
        faults.add(where, "environment", HIDDEN, "not a mapping", "Write NAME: value pairs")
        return {}
    for name, value in environment.items():
        variable = f"environment.{name}"
        if not isinstance(name, str) or not _ENVIRONMENT_NAME.fullmatch(name):
            faults.add(where, variable, HIDDEN, "not the name of an environment variable", "Use letters, digits and _")
        elif RESERVED_ENVIRONMENT.fullmatch(name):
            faults.add(where, variable, HIDDEN, "set by gpufleet for each GPU", "Leave it out")
        elif not isinstance(value, (str, int, float)) or isinstance(value, bool):
            faults.add(where, variable, HIDDEN, f"a {type(value).__name__}, not a text", "Write it in quotes")
        elif reason := unsupported_environment(str(value)):
            faults.add(where, variable, HIDDEN, reason, "Pass it in a file and name that file here")
    return {str(name): str(value) for name, value in environment.items()}


def _check_group(where: str, group: str, groups: Mapping[str, list[str]], gpu_group: str, faults: Faults) -> None:
    hosts = set(groups.get(group, ()))
    if group != gpu_group and not hosts:
        faults.add(where, "group", group, "there is no host in this group", "Name a group with GPU servers in it")
    for host in sorted(hosts - set(groups.get(gpu_group, ()))):
        faults.add(where, "group", group, f"{host} is in it but not in {gpu_group}", f"Put {host} into {gpu_group} too")


def _refuse_overlapping_routes(services: Mapping[str, Mapping[str, Any]], faults: Faults) -> None:
    routes = sorted((str(service["route"]), name) for name, service in services.items() if service["route"])
    for (outer, first), (inner, second) in itertools.combinations(routes, 2):
        if inner.startswith(outer):
            remedy = "Give every service a path of its own"
            faults.add(f"service {second}", "route", inner, f"overlaps with {outer!r} of service {first}", remedy)


def _refuse_shared_uuids(gpus: Mapping[str, list[dict[str, Any]]], faults: Faults) -> None:
    owner: dict[str, str] = {}
    for host, cards in gpus.items():
        for card in cards:
            first = owner.setdefault(card["device"], host)
            if first != host and not card["device"].isdigit():
                remedy = "A UUID names one card in the world; correct the copy"
                faults.add(f"host {host}", "gpus, device", card["device"], f"listed for {first} too", remedy)


def _refuse_shared_addresses(addresses: Mapping[str, str], faults: Faults) -> None:
    owner: dict[str, str] = {}
    for host, address in addresses.items():
        first = owner.setdefault(address, host)
        if first != host:
            remedy = "Give every GPU server an address of its own"
            faults.add(f"host {host}", "ansible_host", address, f"the address of {first} too", remedy)


def _monitoring_listeners(
    gpus: Iterable[str], gateways: list[dict[str, str]], monitoring: list[dict[str, str]]
) -> dict[tuple[str, int], str]:
    """The listeners that monitoring brings, by host and port; none where no host is in its group."""
    if not monitoring:
        return {}
    fronts, watchers = ([member["host"] for member in members] for members in (gateways, monitoring))
    places = {
        "node": [*gpus, *fronts, *watchers],
        **dict.fromkeys(("nginx", "nginx_status", "requests"), fronts),
        **dict.fromkeys(("prometheus", "probe", "alertmanager"), watchers),
    }
    return {(host, MONITORING_PORTS[kind]): f"monitoring ({kind})" for kind, hosts in places.items() for host in hosts}


def _refuse_collisions(
    instances: list[dict[str, Any]],
    gateways: list[dict[str, str]],
    ports: Mapping[int, str],
    taken: dict[tuple[str, int], str],
    faults: Faults,
) -> None:
    """Refuse two listeners on one port of a host, and names that the operating system cannot carry.

    :param ports: the gateways' ports, each with the variable that it comes from.
    """
    for gateway, (port, variable) in itertools.product(gateways, ports.items()):
        owner = taken.setdefault((gateway["host"], port), "the gateway")
        if owner != "the gateway":
            problem = f"the port of the gateway is taken by {owner}"
            faults.add(f"host {gateway['host']}", variable, port, problem, "Give the gateway another port")
    for instance in instances:
        where, base_port = f"host {instance['host']}", f"services.{instance['service']}.base_port"
        owner = taken.setdefault((instance["host"], instance["port"]), instance["id"])
        if owner != instance["id"]:
            problem = f"the port of {instance['id']} is taken by {owner}"
            faults.add(where, base_port, instance["port"], problem, "Move base_port to a free range")
        if instance["port"] > 65535:
            faults.add(where, base_port, instance["port"], "above 65535", "Lower base_port")
        if len(instance["socket"]) > SOCKET_PATH_MAX and where not in faults.places:
            problem = f"the path {instance['socket']} is longer than the {SOCKET_PATH_MAX} characters of a socket's"
            faults.add(where, "inventory_hostname", instance["host"], problem, "Give the host a shorter inventory name")

"""What the gateway and its agent ask an instance: live, ready, status, metrics, and a slot for who waits."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from slot_guard.messages import Scope
from slot_guard.settings import Network

PREFIX = "/_slot_guard"
"""Path under which nothing reaches the app."""

GATEWAY_HEADER = b"x-gpufleet-instance"
"""Header of every request that the gateway passes on for a client."""


QUEUED_HEADER = b"x-gpufleet-queued"
"""Header of a question for a slot: since when the request waits, and what time it is; both by the gateway's clock."""


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of a name, or an empty text."""
    return next((value for known, value in scope["headers"] if known == name), b"")


def seconds_waited(scope: Scope) -> float:
    """How long the request behind a question for a slot has waited already, here or at other GPUs."""
    try:
        since, now = map(float, header(scope, QUEUED_HEADER).split())
    except ValueError:
        return 0.0
    return max(0.0, now - since)


def from_gateway(scope: Scope) -> bool:
    """Whether the gateway passed this request on for a client."""
    return any(name == GATEWAY_HEADER for name, _ in scope["headers"])


def is_admin_path(path: str) -> bool:
    """Whether a path belongs to the guard."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def may_ask(scope: Scope, networks: Iterable[Network]) -> bool:
    """Whether the TCP peer may use the admin endpoints: loopback or one of `networks`, and not on a client's behalf."""
    if from_gateway(scope) or not scope.get("client"):
        return False
    try:
        peer = ipaddress.ip_address(scope["client"][0])
    except ValueError:
        return False
    # A socket that listens on IPv6 and IPv4 gives IPv4 peers as ::ffff:10.0.0.1.
    peer = getattr(peer, "ipv4_mapped", None) or peer
    return peer.is_loopback or any(peer in network for network in networks)


def metrics_text(status: Mapping[str, Any]) -> bytes:
    """The status document in Prometheus' text format 0.0.4."""
    labels = ",".join(f'{name}="{_escape(status[name])}"' for name in ("instance", "version"))
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: Mapping[str, float]) -> None:
        lines.append(f"# HELP slot_guard_{name} {text}")
        lines.append(f"# TYPE slot_guard_{name} {kind}")
        lines.extend(f"slot_guard_{name}{{{labels}{extra}}} {value}" for extra, value in samples.items())

    outcomes = {f',outcome="{outcome}"': status[outcome] for outcome in ("served", "refused", "failed")}
    family("requests_total", "counter", "Requests by outcome.", outcomes)
    family("in_flight", "gauge", "Slots held by work, its client there or not.", {"": status["in_flight"]})
    family("waiting", "gauge", "Requests that wait for a slot.", {"": status["waiting"]})
    family("slots", "gauge", "Requests that may be worked on at once.", {"": status["slots"]})
    family("ready", "gauge", "1 while new requests are taken.", {"": int(status["state"] == "ready")})
    family("suspect", "gauge", "1 while taken out for failures.", {"": int(status["state"] == "suspect")})
    family("recycling", "gauge", "1 while it ends because it has worn out.", {"": int(status["state"] == "recycling")})
    family("start_time_seconds", "gauge", "When the process began, in Unix time.", {"": status["started"]})
    family("consecutive_failures", "gauge", "Failed requests in a row.", {"": status["consecutive_failures"]})
    family("trips", "gauge", "Times in a row that it was taken out.", {"": status["trips"]})
    blocked = status["loop_blocked"]
    family("loop_blocked_total", "counter", "Times the app held its event loop for a second.", {"": blocked["count"]})
    family("loop_blocked_seconds_max", "gauge", "Longest of these.", {"": blocked["longest_seconds"]})
    return "".join(f"{line}\n" for line in lines).encode()


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

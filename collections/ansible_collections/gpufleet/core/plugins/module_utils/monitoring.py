# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""What Prometheus asks, and how long it waits before it tells: pure derivations from the fleet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRICS_PATH = "/cluster/metrics"
"""Where a gateway serves its agent's metrics, and below it those of its other exporters, to monitoring hosts alone."""

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("", "0.0.0.0", "[::]")

GATEWAY_EXPORTERS = ("nginx", "requests", "node")


def scrape_targets(fleet: Mapping[str, Any], host: str, listens_at: str = LOOPBACK) -> list[dict[str, Any]]:
    """What the Prometheus of ``host`` asks, as file_sd has it. Every target says its own job.

    A gateway's exporters listen at loopback and are asked through the gateway. Each gateway has an agent that tells of
    all instances, so what they tell says whose it is. An address that they have in common is probed as well.
    """
    ports = fleet["monitoring_ports"]
    gateways = {gateway["host"]: gateway["url"] for gateway in fleet["gateways"]}
    itself = LOOPBACK if listens_at in EVERYWHERE else listens_at
    targets = [_target(f"{itself}:{ports['prometheus']}", "prometheus", host)]
    for name, url in gateways.items():
        scheme, _, address = url.partition("://")
        own = {"__scheme__": scheme}
        targets.append(_target(address, "agent", name, gateway=name, __metrics_path__=METRICS_PATH, **own))
        targets += [
            _target(address, job, name, __metrics_path__=f"{METRICS_PATH}/{job}", **own) for job in GATEWAY_EXPORTERS
        ]
    entrances = {**gateways, **({fleet["vip"]["address"]: fleet["url"]} if fleet["vip"] else {})}
    for name, url in entrances.items():
        probe = {"__metrics_path__": "/probe", "__param_module": "gateway"}
        probe["__param_target"] = f"{url}/health"
        targets.append(_target(f"{LOOPBACK}:{ports['probe']}", "probe", name, **probe))
    others = {name: entry["address"] for name, entry in fleet["hosts"].items()}
    for name, address in {host: LOOPBACK, **others}.items():
        if name not in gateways:
            targets.append(_target(f"{address}:{ports['node']}", "node", name))
    return targets


def _target(address: str, job: str, host: str, **labels: str) -> dict[str, Any]:
    return {"targets": [address], "labels": {"job": job, "host": host, "instance": host, **labels}}


def alert_rules(rules: Mapping[str, Any], waits: Mapping[str, str]) -> dict[str, Any]:
    """The alert rules with other waiting times (``for``) by alert; ValueError where there is no such alert."""
    known = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    if unknown := set(waits) - known:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"monitoring_alert_for names no alert: {names}. Known are {', '.join(sorted(known))}.")
    groups = [
        {**group, "rules": [{**rule, "for": waits.get(rule["alert"], rule["for"])} for rule in group["rules"]]}
        for group in rules["groups"]
    ]
    return {"groups": groups}

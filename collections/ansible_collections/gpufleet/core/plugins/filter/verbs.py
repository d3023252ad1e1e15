# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Filters of status.yml, smoke.yml and doctor.yml: from what hosts and gateway say to one document and its lines."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

Document = dict[str, Any]

DRAINED = ("draining", "drained")

_SERVER_NAME = re.compile(r"^\s*server_name\s+(\S+);", re.MULTILINE)


def status_document(fleet: Mapping[str, Any], pages: list[Any], addresses: list[Any], drains: list[Any]) -> Document:
    """Return what the page tells of the gateway that clients reach, with ``ok`` and how the gateways are.

    :param pages: for each gateway the result of asking it for /cluster/status.
    :param addresses: likewise for the common address among its own; empty where there is none.
    :param drains: likewise of asking it for its drain flags, which tell what the page keeps to itself: who it was.
    """
    gateways = _gateways(fleet, addresses)
    told = [_with_drains(_page(page), flags) for page, flags in zip(pages, drains)]
    holders = [page for page, gateway in zip(told, gateways) if page and gateway["has_vip"]]
    shown = next(iter([*holders, *filter(None, told)]), {})
    faults = [
        f"{_whose(fleet, gateway['host'])}the agent does not tell the state of the cluster: {_reason(page)}"
        for gateway, page, document in zip(gateways, pages, told)
        if not document
    ]
    vip_faults = _vip_faults(fleet, gateways)
    return {
        "ok": not vip_faults and shown.get("status") in ("healthy", "degraded"),
        "url": fleet["url"],
        "gateways": gateways,
        "faults": [*faults, *vip_faults],
        **shown,
    }


def status_lines(document: Mapping[str, Any]) -> list[str]:
    """Return a status document for people: a line for each instance."""
    rows = [
        f"{one['id']}  {one['state']}  {one['in_flight']}/{one['slots']}"
        f"{'  {} waiting'.format(one['waiting']) if one.get('waiting') else ''}  {one['version']}  since {one['since']}"
        f"  {'; '.join(filter(None, (one.get('reason') or one.get('warning'), _drain(one))))}".rstrip()
        for one in document.get("instances", [])
    ]
    holders = [gateway["host"] for gateway in document["gateways"] if gateway["has_vip"]]
    total = f"{document.get('status', 'unknown')}: {document.get('available_capacity')} of "
    total += f"{document.get('total_capacity')} concurrent requests available at {document['url']}"
    return [*rows, *document["faults"], total + (f", on {' and '.join(holders)}" if holders else "")]


def _with_drains(page: Document | None, flags: Any) -> Document | None:
    """Return a page whose drains are told as their flags have them, where those could be read."""
    records = (flags.get("drains") if isinstance(flags, Mapping) else None) or {}
    if page:
        instances = [{**one, "drain": records.get(one["id"]) or one.get("drain")} for one in page["instances"]]
        page = {**page, "instances": instances}
    return page


def _drain(one: Mapping[str, Any]) -> str:
    drain = one.get("drain") or {}
    if not drain.get("by"):
        return ""
    return f"drained by {drain['by']} since {drain['since']}: {drain.get('reason') or 'no reason given'}"


def with_smoke(instances: list[Mapping[str, Any]], fleet: Mapping[str, Any]) -> list[Document]:
    """Return instances with the smoke request and the time limit of their services, as instance_check takes them."""
    services = fleet["services"]
    return [
        {
            **{key: one[key] for key in ("id", "address", "port")},
            "smoke": services[one["service"]].get("smoke") or {},
            "timeout": services[one["service"]]["time_limit_seconds"],
        }
        for one in instances
    ]


def smoke_document(instances: list[Mapping[str, Any]], answers: Mapping[str, Any]) -> Document:
    """Return how the instances answered, one by one, as instance_check tells it."""
    rows = [
        {
            "id": one["id"],
            "tried": bool(one.get("smoke")),
            "problem": told["smoke"] if one.get("smoke") else told["problem"],
        }
        for one in instances
        for told in (answers[one["id"]],)
    ]
    return {"ok": not any(row["problem"] for row in rows), "instances": rows, "faults": _faults(rows)}


def doctor_document(
    fleet: Mapping[str, Any],
    programs: Mapping[str, str],
    answers: list[Any],
    configurations: list[Any],
    pages: list[Any],
    addresses: list[Any],
) -> Document:
    """Compare what should be with what is: expected = running = answering = in the gateways = on their pages.

    :param programs: by host what ``supervisorctl status`` printed; hosts that could not be asked are missing.
    :param answers: for each gateway what instance_check tells, asked from there.
    :param configurations: likewise the result of reading its nginx configuration.
    :param pages: likewise that of asking it for /cluster/status.
    :param addresses: likewise for the common address among its own; empty where there is none.
    """
    expected = {instance["id"] for instance in fleet["instances"]}
    rows = {name: {**row, "answers": True, "routed": True, "page": {}} for name, row in _running(fleet, programs)}
    extra = []
    gateways = _gateways(fleet, addresses)
    for gateway, asked, read, page in zip(gateways, answers, configurations, pages):
        host, whose = gateway["host"], _whose(fleet, gateway["host"])
        if "instances" not in asked:
            extra.append(f"{host}: this gateway cannot be asked: {_reason(asked)}")
            continue
        routed = set(_SERVER_NAME.findall(b64decode(read.get("content", "")).decode())) - {"_"}
        told = {one["id"]: one for one in (_page(page) or {}).get("instances", [])}
        for name, row in rows.items():
            problem = asked["instances"][name]["problem"]
            row["answers"] = row["answers"] and not problem
            row["routed"] = row["routed"] and name in routed
            row["page"][host] = told.get(name, {}).get("state", "missing")
            row["problems"] += [
                f"{whose}{text}"
                for text in (
                    problem and f"the gateway gets no good answer: {problem}",
                    "" if name in routed else "it is not in the gateway's nginx configuration; run site.yml",
                    _page_problem(told.get(name)),
                )
                if text
            ]
        extra += [
            f"{name}: {whose}nobody expects it, and the gateway routes to it; run site.yml"
            for name in sorted(routed - expected)
        ]
        extra += [f"{name}: {whose}nobody expects it, and it is on the page" for name in sorted(set(told) - expected)]
    for row in rows.values():
        drained = [host for host, state in row["page"].items() if state in DRAINED]
        others = [host for host, state in row["page"].items() if state not in (*DRAINED, "missing")]
        if drained and others:
            who = f"drained on {' and '.join(drained)} and not on {' and '.join(others)}"
            row["problems"].append(f"it is {who}; run drain.yml or undrain.yml")
        row["problem"] = "; ".join(row.pop("problems"))
    wanted = {(instance["host"], instance["program"]) for instance in fleet["instances"]}
    extra += [
        f"{program} on {host}: nobody expects it, and it is {state}; run site.yml"
        for host in sorted(programs)
        for program, state in sorted(_program_states(programs[host]).items())
        if program.startswith("gpufleet-") and (host, program) not in wanted
    ]
    instances = list(rows.values())
    faults = [*_faults(instances), *extra, *_vip_faults(fleet, gateways)]
    return {"ok": not faults, "instances": instances, "gateways": gateways, "faults": faults}


def _running(fleet: Mapping[str, Any], programs: Mapping[str, str]) -> Iterator[tuple[str, Document]]:
    """By id of each instance what Supervisor says of its program."""
    for instance in fleet["instances"]:
        name, host = instance["program"], instance["host"]
        state = "unknown, its host cannot be asked"
        if host in programs:
            state = _program_states(programs[host]).get(name, "missing")
        problems = [] if state == "RUNNING" else [f"program {name} on {host} is {state}"]
        yield instance["id"], {"id": instance["id"], "program": state, "problems": problems}


def _gateways(fleet: Mapping[str, Any], addresses: list[Any]) -> list[Document]:
    """The gateways, and which of them has the common address."""
    vip = fleet["vip"]["address"] if fleet["vip"] else None
    return [
        {"host": gateway["host"], "has_vip": vip is not None and f"{vip}/" in (found or {}).get("stdout", "")}
        for gateway, found in zip_longest(fleet["gateways"], addresses)
    ]


def _vip_faults(fleet: Mapping[str, Any], gateways: list[Document]) -> list[str]:
    holders = [gateway["host"] for gateway in gateways if gateway["has_vip"]]
    if not fleet["vip"] or len(holders) == 1:
        return []
    address = fleet["vip"]["address"]
    if holders:
        return [f"{' and '.join(holders)} have {address} at a time: they do not hear each other"]
    return [f"no gateway has {address}: on none of those that can be asked does nginx serve and keepalived run"]


def _whose(fleet: Mapping[str, Any], host: str) -> str:
    """What precedes a problem that a gateway has: its name, where there are several."""
    return f"{host}: " if len(fleet["gateways"]) > 1 else ""


def verdict_lines(document: Mapping[str, Any]) -> list[str]:
    """Return a smoke or doctor document for people: what is wrong, or that nothing is."""
    count = len(document["instances"])
    return [*document["faults"], f"{count} instances, {len(document['faults'])} faults"]


def _faults(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['id']}: {row['problem']}" for row in rows if row["problem"]]


def _program_states(text: str) -> dict[str, str]:
    return {words[0]: words[1] for words in (line.split() for line in text.splitlines()) if len(words) > 1}


def _page(page: Any) -> Document | None:
    """Return the document in a result of ansible.builtin.uri, or None."""
    content = page.get("content") if isinstance(page, Mapping) else None
    try:
        document = json.loads(content or "")
    except ValueError:
        return None
    return document if isinstance(document, dict) and "instances" in document else None


def _reason(page: Any) -> str:
    return str(page.get("msg", page)) if isinstance(page, Mapping) else str(page)


def _page_problem(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return "it is not on the page /cluster/status; is the agent running?"
    if told.get("state") in ("ready", *DRAINED):  # who drains knows
        return ""
    return f"the page has it as {told.get('state')}" + (f": {told['reason']}" if told.get("reason") else "")


class FilterModule:
    """Filters ``gpufleet.core.*``."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name the filters of this module."""
        return {
            "with_smoke": with_smoke,
            "status_document": status_document,
            "status_lines": status_lines,
            "smoke_document": smoke_document,
            "doctor_document": doctor_document,
            "verdict_lines": verdict_lines,
        }

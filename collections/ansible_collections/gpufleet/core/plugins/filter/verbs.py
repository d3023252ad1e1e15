# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Filters of status.yml, smoke.yml and doctor.yml: from what hosts and gateway say to one document and its lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Document = dict[str, Any]

_SERVER_NAME = re.compile(r"^\s*server_name\s+(\S+);", re.MULTILINE)


def status_document(page: Any) -> Document:
    """Return what the gateway's page tells, with ``ok``; ``page`` is the result of asking for /cluster/status."""
    told = _page(page)
    if not told:
        return {"ok": False, "faults": [f"the agent does not tell the state of the cluster: {_reason(page)}"]}
    return {"ok": told.get("status") in ("healthy", "degraded"), "faults": [], **told}


def status_lines(document: Mapping[str, Any]) -> list[str]:
    """Return a status document for people: a line for each instance."""
    rows = [
        f"{one['id']}  {one['state']}  {one['in_flight']}/{one['slots']}"
        f"{'  {} waiting'.format(one['waiting']) if one.get('waiting') else ''}  {one['version']}  since {one['since']}"
        f"  {one.get('reason') or one.get('warning') or ''}".rstrip()
        for one in document.get("instances", [])
    ]
    total = f"{document.get('status', 'unknown')}: {document.get('available_capacity')} of "
    return [*rows, *document["faults"], total + f"{document.get('total_capacity')} concurrent requests available"]


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
    fleet: Mapping[str, Any], programs: Mapping[str, str], answers: Mapping[str, Any], configuration: str, page: Any
) -> Document:
    """Compare what should be with what is: expected = running = answering = in the gateway = on its page.

    :param programs: by host what ``supervisorctl status`` printed; hosts that could not be asked are missing.
    :param answers: by instance what instance_check tells, asked from the gateway.
    :param configuration: the nginx configuration of the gateway.
    :param page: the result of asking the gateway for /cluster/status.
    """
    routed = set(_SERVER_NAME.findall(configuration)) - {"_"}
    told = {one["id"]: one for one in (_page(page) or {}).get("instances", [])}
    rows = []
    for instance in fleet["instances"]:
        name, host = instance["id"], instance["host"]
        states = _program_states(programs[host]) if host in programs else {}
        running = (
            states.get(instance["program"], "missing") if host in programs else "unknown, its host cannot be asked"
        )
        problems = [
            "" if running == "RUNNING" else f"program {instance['program']} on {host} is {running}",
            answers[name]["problem"] and f"the gateway gets no good answer: {answers[name]['problem']}",
            "" if name in routed else "it is not in the gateway's nginx configuration; run site.yml",
            _page_problem(told.get(name)),
        ]
        rows.append(
            {
                "id": name,
                "program": running,
                "answers": not answers[name]["problem"],
                "routed": name in routed,
                "page": told.get(name, {}).get("state", "missing"),
                "problem": "; ".join(filter(None, problems)),
            }
        )
    expected = {instance["id"] for instance in fleet["instances"]}
    wanted = {(instance["host"], instance["program"]) for instance in fleet["instances"]}
    extra = [
        f"{name}: nobody expects it, and the gateway routes to it; run site.yml" for name in sorted(routed - expected)
    ]
    extra += [f"{name}: nobody expects it, and it is on the page" for name in sorted(set(told) - expected)]
    extra += [
        f"{program} on {host}: nobody expects it, and it is {state}; run site.yml"
        for host in sorted(programs)
        for program, state in sorted(_program_states(programs[host]).items())
        if program.startswith("gpufleet-") and (host, program) not in wanted
    ]
    faults = [*_faults(rows), *extra]
    return {"ok": not faults, "instances": rows, "faults": faults}


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
    if told.get("state") in ("ready", "draining", "drained"):  # who drains knows
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

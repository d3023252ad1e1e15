"""What the agent tells: the cluster's status document, its health in a line, and metrics. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet_agent.config import Config, Instance
from fleet_agent.decision import GUARD_STATES, READY, Standing
from fleet_agent.drains import Drain

DRAINING = "draining"
DRAINED = "drained"
STATES = (READY, "loading", "suspect", "recycling", "stopping", "failed", DRAINING, DRAINED, "down")

_COUNTS = ("in_flight", "waiting", "queue", "served", "refused", "failed")


@dataclass(frozen=True)
class View:
    """All that is known after a pass."""

    config: Config
    standings: Mapping[str, Standing]
    """By the id of each instance of `config`."""
    drained: Mapping[str, Drain]
    """By name of each drain flag that is raised, what it tells."""
    warning: str
    """Why silence raised no flag in this pass; empty where it needed not or did."""
    timestamp: str
    """When the pass ended, ISO 8601."""
    seconds: float
    """How long it took."""
    changes: Sequence[Mapping[str, Any]] = ()
    """What operators and roll-outs did last, the newest first."""

    def state(self, name: str) -> str:
        """One of STATES. A drain shows as long as the guard answers: of an instance that is down it says nothing."""
        standing = self.standings[name]
        if name in self.drained and standing.state in GUARD_STATES:
            if standing.numbers.get("in_flight", 0) > 0:
                return DRAINING
            if standing.state == READY:
                return DRAINED
        return standing.state


def document(view: View) -> dict[str, Any]:
    """The status document: the fields of the article's constant one, made true, and what it lacked.

    total_capacity counts concurrent requests by the inventory, available_capacity those of the ready instances,
    whether they are in use or not. gpus_per_server and concurrent_per_gpu are null where they differ within the fleet.
    """
    config = view.config
    entries = [_entry(view, instance) for instance in config.instances]
    gpus = {(instance.host, instance.gpu) for instance in config.instances}
    slots = Counter[tuple[str, int]]()
    for instance in config.instances:
        slots[instance.host, instance.gpu] += instance.slots
    per_server = Counter(host for host, _ in gpus)
    services = sorted({instance.service for instance in config.instances})
    totals = _sums(entries)
    return {
        # An agent that holds flags back does not know what it would have to know to call the cluster healthy.
        "status": "degraded" if view.warning and totals["status"] == "healthy" else totals["status"],
        "cluster": config.cluster,
        "timestamp": view.timestamp,
        "total_capacity": totals["total_capacity"],
        "available_capacity": totals["available_capacity"],
        "servers": len(per_server),
        "gpus_per_server": _common(per_server.values()),
        "concurrent_per_gpu": _common(slots.values()),
        "warning": view.warning or None,
        "totals": totals,
        "services": {name: _sums([entry for entry in entries if entry["service"] == name]) for name in services},
        "instances": entries,
        "changes": list(view.changes),
    }


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a reader of one document must write over it to have the next; None where instances came or went.

    Of the instances these are those that differ, whole.
    """
    known = {entry["id"]: entry for entry in before["instances"]}
    if list(known) != [entry["id"] for entry in after["instances"]]:
        return None
    fields = {name: value for name, value in after.items() if value != before[name]}
    return {**fields, "instances": [entry for entry in after["instances"] if entry != known[entry["id"]]]}


def health(document: Mapping[str, Any]) -> str:
    """The health in one line: `healthy` alone, or what is left of the cluster."""
    totals = document["totals"]
    if document["status"] == "healthy":
        return "healthy\n"
    warning = f"; {document['warning']}" if document["warning"] else ""
    return (
        f"{document['status']}: {totals['ready']} of {totals['instances']} instances ready, "
        f"{totals['available_capacity']} of {totals['total_capacity']} slots{warning}\n"
    )


def metrics(document: Mapping[str, Any], seconds: float) -> str:
    """The status document in Prometheus' text format 0.0.4; `seconds` is what the pass took."""
    lines: list[str] = []

    def family(name: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]], kind: str = "gauge") -> None:
        lines.append(f"# HELP gpufleet_{name} {text}")
        lines.append(f"# TYPE gpufleet_{name} {kind}")
        for labels, value in samples:
            # JSON escapes what Prometheus wants escaped, and as it wants it.
            shown = ",".join(f"{name}={json.dumps(text, ensure_ascii=False)}" for name, text in labels.items())
            lines.append(f"gpufleet_{name}{{{shown}}} {value}" if shown else f"gpufleet_{name} {value}")

    entries: Sequence[Mapping[str, Any]] = document["instances"]
    states = [({**_labels(entry), "state": name}, int(entry["state"] == name)) for entry in entries for name in STATES]
    family("instance_state", "1 for the state that an instance is in.", states)
    for field, name, text in (
        ("in_flight", "in_flight", "Slots held by work."),
        ("waiting", "waiting", "Requests that wait for a slot."),
        ("slots", "slots", "Requests that the gateway lets in at once."),
        ("started", "start_time_seconds", "When the process began, in Unix time."),
    ):
        known = [entry for entry in entries if entry[field] is not None]
        family(f"instance_{name}", text, [(_labels(entry), entry[field]) for entry in known])
    for field, text in (
        ("drained", "1 while an operator or a roll-out keeps requests away."),
        ("warning", "1 while something is wrong with an instance that serves all the same."),
    ):
        family(f"instance_{field}", text, [(_labels(entry), int(bool(entry[field]))) for entry in entries])
    outcomes = [
        ({**_labels(entry), "outcome": outcome}, entry[outcome])
        for entry in entries
        for outcome in ("served", "refused", "failed")
        if entry[outcome] is not None
    ]
    family("instance_requests_total", "Requests that reached an instance, since it began.", outcomes, "counter")
    family("agent_pass_seconds", "How long the last pass over all instances took.", [({}, round(seconds, 3))])
    family("agent_warning", "1 while silence raises no flag.", [({}, int(document["warning"] is not None))])
    return "".join(f"{line}\n" for line in lines)


def _labels(entry: Mapping[str, Any]) -> dict[str, str]:
    return {"instance": entry["id"], "service": entry["service"], "host": entry["host"]}


def _entry(view: View, instance: Instance) -> dict[str, Any]:
    standing = view.standings[instance.id]
    return {
        "id": instance.id,
        "service": instance.service,
        "host": instance.host,
        "gpu": instance.gpu,
        "address": instance.address,
        "port": instance.port,
        "state": view.state(instance.id),
        "reason": standing.reason or None,
        "warning": standing.numbers.get("warning") or None,
        "since": standing.since or None,
        "started": standing.numbers.get("started"),
        "slots": instance.slots,
        **{name: standing.numbers.get(name) for name in _COUNTS},
        "version": standing.numbers.get("version") or None,
        "drained": instance.id in view.drained,
        "drain": view.drained.get(instance.id),
    }


def _sums(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ready = [entry for entry in entries if entry["state"] == READY]
    status = "healthy" if len(ready) == len(entries) else "degraded" if ready else "down"
    return {
        "status": status,
        "instances": len(entries),
        "ready": len(ready),
        "total_capacity": sum(entry["slots"] for entry in entries),
        "available_capacity": sum(entry["slots"] for entry in ready),
        **{name: sum(entry[name] or 0 for entry in entries) for name in _COUNTS},
    }


def _common(values: Iterable[int]) -> int | None:
    """The value that all have, or None."""
    different = set(values)
    return different.pop() if len(different) == 1 else None

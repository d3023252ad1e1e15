# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Filters for day two: which instances a target means, in which batches a rollout goes, and how it is told."""

from __future__ import annotations

import base64
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import parse_programs

Entry = dict[str, Any]


def target(fleet: Mapping[str, Any], wanted: str | None) -> list[Entry]:
    """Return the instances that a target names: a host, host:GPU, an instance, a service, or several with commas.

    :raises AnsibleFilterError: no target, or one that is nothing of the fleet; says what there is.
    """
    instances = fleet["instances"]
    known: dict[str, list[Entry]] = {}
    for instance in instances:
        gpu = f"{instance['host']}:{instance['gpu']}"
        for name in dict.fromkeys((instance["host"], gpu, instance["id"], instance["service"])):
            known.setdefault(name, []).append(instance)
    usage = "Name a host, host:GPU, an instance or a service with -e target=…, several with commas"
    names = [name.strip() for name in str(wanted or "").split(",") if name.strip()]
    if not names:
        raise AnsibleFilterError(f"There is no target. {usage}.")
    unknown = [name for name in names if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], list(known), n=1)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise AnsibleFilterError(
            f"The fleet has no {', '.join(unknown)}.{guess} {usage}. Hosts: {', '.join(sorted(fleet['hosts']))}; "
            f"services: {', '.join(sorted(fleet['services']))}."
        )
    chosen = {instance["id"] for name in names for instance in known[name]}
    return [instance for instance in instances if instance["id"] in chosen]


def removable(fleet: Mapping[str, Any], host: str | None, groups: Mapping[str, Iterable[str]]) -> list[Entry]:
    """Return the instances of a host that is to be removed; none where it has left the fleet already.

    :raises AnsibleFilterError: no host, one that the inventory does not know, the last one of some service, or the
        only gateway.
    """
    if not host:
        raise AnsibleFilterError("There is no target. Name the host to remove with -e target=….")
    if host not in groups["all"]:
        raise AnsibleFilterError(
            f"The inventory has no host {host}, so it cannot be reached. Remove it from the fleet's groups only after "
            f"this. Hosts of the fleet: {', '.join(sorted(fleet['hosts']))}."
        )
    if [gateway["host"] for gateway in fleet["gateways"]] == [host]:
        raise AnsibleFilterError(f"{host} is the only gateway. Add another one first.")
    leaving = [instance for instance in fleet["instances"] if instance["host"] == host]
    left = {instance["service"] for instance in fleet["instances"] if instance["host"] != host}
    bare = sorted({instance["service"] for instance in leaving} - left)
    if bare:
        raise AnsibleFilterError(f"{host} has the last GPUs of {', '.join(bare)}. Add others first.")
    return leaving


def batches(pending: Mapping[str, Iterable[Entry]], fleet: Mapping[str, Any], batch: Any = 1) -> list[list[Entry]]:
    """Return what a rollout does one after the other, as lists of entries that go at a time.

    First all that leaves, which nothing is sent to any more; then one instance alone, the canary; then the rest.

    :param pending: by host what supervisor_programs reports as pending there.
    :param batch: how many instances at a time: a number, or a percentage of the fleet's, at least one.
    """
    size = _batch_size(batch, len(fleet["instances"]))
    entries = [
        {
            **entry,
            "host": host,
            "id": entry["instance"] or f"{entry['program']} on {host}",
            "address": fleet["hosts"].get(host, {}).get("address", host),
        }
        for host in sorted(pending)
        for entry in pending[host]
    ]
    leaving = [entry for entry in entries if entry["change"] == "leaving"]
    others = [entry for entry in entries if entry["change"] != "leaving"]
    rest = others[1:]
    steps = [leaving, others[:1], *(rest[start : start + size] for start in range(0, len(rest), size))]
    return [step for step in steps if step]


def _batch_size(batch: Any, total: int) -> int:
    text = str(batch).strip()
    number = text[:-1] if text.endswith("%") else text
    if not number.isdecimal() or int(number) < 1 or (text.endswith("%") and int(number) > 100):
        raise AnsibleFilterError(
            f"rollout_batch = {batch!r}: neither a number from 1 nor a percentage. Give for instance 2 or 25%."
        )
    return max(1, total * int(number) // 100) if text.endswith("%") else int(number)


def outcomes(
    batch: Sequence[Entry], drained: Mapping[str, Any], results: Mapping[str, Any], what: str = "rollout"
) -> list[Entry]:
    """Return for each entry of a batch what became of it, in the form of the audit log.

    :param drained: result of the drain on all gateways.
    :param results: by host the result of supervisor_programs; of a batch that was not drained they are older ones.
    :param what: what the operator calls it.
    """
    gateways = [one for one in drained.get("results", []) if isinstance(one, Mapping)]
    waited = max((one.get("seconds", 0) for one in gateways), default=0)
    told = []
    for entry in batch:
        result, seconds = results.get(entry["host"]) or {}, {}
        if drained.get("failed") or drained.get("unreachable"):
            problems = [str(one.get("msg")) for one in gateways if one.get("failed") or one.get("unreachable")]
            outcome = f"not begun: {' '.join(problems) or drained.get('msg', 'the gateway did not answer')}"
        elif result.get("unreachable") or result.get("failed"):
            lines = str(result.get("msg", "no reason given")).splitlines()
            own = next((line for line in lines if line.startswith(f"{entry['program']}: ")), lines[0])
            outcome = f"failed: {own.removeprefix(entry['program'] + ': ')}"
        else:
            outcome, seconds = "ok", {"drain": waited, **result.get("seconds", {})}
        told.append(
            {
                "what": what,
                "instance": entry["id"],
                "change": entry["change"],
                "from": entry["from"],
                "to": entry["to"],
                "result": outcome,
                "seconds": seconds,
            }
        )
    return told


def returning(batch: Sequence[Entry], told: Sequence[Entry], fleet: Mapping[str, Any]) -> list[Entry]:
    """Return the entries of a batch that may serve again, as the module drain takes them.

    A restart that failed stays drained: nothing else than what failed could be put back.

    :param told: what :func:`outcomes` says of them.
    """
    ports = {instance["id"]: instance["port"] for instance in fleet["instances"]}
    return [
        {
            **entry,
            "port": ports.get(entry["instance"]),
        }  # one that left has none: it never gets ready, so it is not asked
        for entry, outcome in zip(batch, told)
        if entry["instance"] and not (entry["change"] == "restart" and outcome["result"].startswith("failed"))
    ]


def changes(
    fleet: Mapping[str, Any], programs: Mapping[str, Mapping[str, Any]], gateway: str, nginx: Mapping[str, Any]
) -> list[Entry]:
    """Return what a run has changed that is no rollout, in the form of the audit log.

    :param programs: by host the result of supervisor_programs, which stopped none.
    :param gateway: the gateway whose log it is.
    :param nginx: the result of nginx_config there.
    """
    names = {(instance["host"], instance["program"]): instance["id"] for instance in fleet["instances"]}
    told = [
        {"what": what, "instance": names.get((host, program), program), "from": before, "to": "serving", "result": "ok"}
        for host, result in sorted(programs.items())
        for what, before, done in (("add", None, "added"), ("start", "down", "started"))
        for program in result.get(done, ())
    ]
    if nginx.get("changed"):
        digests = {"from": nginx.get("digest_before"), "to": nginx["digest"]}
        told.append({"what": "configure", "instance": gateway, **digests, "result": "ok"})
    return told


def release_before(records: Mapping[str, Entry], links: Iterable[Entry], service: str) -> str:
    """Return the newest release that came into service on all hosts before the one that each of them has now.

    Going back moves a host's link and leaves its record as it is: who goes back again gets one that is older still.

    :param records: by host the result of a slurp of its record, which may have failed for want of one.
    :param links: for each of these hosts the result of a stat of its link to the release that it has now.
    :raises AnsibleFilterError: they have none in common.
    """
    older: dict[str, list[str]] = {}
    told = []
    for (host, record), link in zip(records.items(), links):
        served = base64.b64decode(record.get("content", "")).decode().split()
        current = PurePath(link.get("stat", {}).get("lnk_target", "")).name
        older[host] = served[served.index(current) + 1 :] if current in served else served
        told.append(f"{host} has {', '.join(older[host]) or 'none'} from before {current or 'the first'}")
    shared = set.intersection(*map(set, older.values()))
    if not shared:
        raise AnsibleFilterError(
            f"There is no release of {service} to go back to on all its hosts: {'; '.join(told)}. "
            "Name one that is on all of them with -e version=…, or leave a host out with --limit."
        )
    return next(one for one in next(iter(older.values())) if one in shared)


def gateway_drains(told: Mapping[str, Mapping[str, Any]], gateway: str) -> dict[str, Entry]:
    """Return what shall be drained on a gateway: by instance what the flag says.

    That is what operators drained on any of them, and what rollouts did on this one: one that was cut off may have left
    its flag on a single gateway, and lifts it nowhere else. A gateway that the others did not have at their last run
    missed what was undrained since: it only takes what they have, of rollouts too.

    :param told: by gateway the result of the module drain that forgets what left the fleet.
    """
    had = [one for one in told if all(one in (other["gateways"] or [one]) for other in told.values())] or list(told)
    flags = [
        (name, record)
        for one in had
        for name, record in told[one]["drains"].items()
        if record.get("owner") != "rollout" or one == gateway or gateway not in had
    ]
    return dict(sorted(flags, key=lambda flag: flag[1].get("owner") != "rollout"))  # an operator's is the last word


def programs_on_release(text: str, releases: str, version: str) -> str:
    """Return a file of programs in which those that run from a release below ``releases`` run from ``version``."""
    programs = parse_programs(text, "gpufleet-")
    sections = []
    for program in programs.programs.values():
        folder, _, running = program.options.get("directory", "").rpartition("/")
        section = program.text
        if folder == releases:
            section = section.replace(f"{releases}/{running}", f"{releases}/{version}")
            section = section.replace(f"SLOT_GUARD_VERSION='{running}'", f"SLOT_GUARD_VERSION='{version}'")
        sections.append(section)
    return programs.header + "".join(sections)


class FilterModule:
    """Filters ``gpufleet.core.*``."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name the filters of this module."""
        return {
            "fleet_changes": changes,
            "fleet_target": target,
            "fleet_removable": removable,
            "gateway_drains": gateway_drains,
            "programs_on_release": programs_on_release,
            "release_before": release_before,
            "rollout_batches": batches,
            "rollout_outcomes": outcomes,
            "rollout_returning": returning,
        }

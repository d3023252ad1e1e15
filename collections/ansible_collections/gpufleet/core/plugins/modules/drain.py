#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Ansible module: keep new requests away from instances until they work on none, or let requests in again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.gateway_state import (
    Record,
    append_audit,
    read_record,
    remove_record,
    utc_now,
    write_record,
)
from ansible_collections.gpufleet.core.plugins.module_utils.instances import Instance, ask_all

DOCUMENTATION = r"""
module: drain
short_description: Drain instances at the gateway, let them serve again, or forget what left
description:
  - Runs on a gateway. Raises a flag file per instance, which nginx honours with the next request, without a reload and
    across reboots; then waits until each instance itself says that it works on nothing. Requests that wait there for a
    slot go to other instances.
  - A flag says who raised it. A rollout neither takes over nor lifts the flag of an operator.
  - Forgets the drains of what left the fleet, so that it serves again should it come back.
  - Takes the drains of another gateway over, so that a new one keeps away from what is drained there, and notes which
    gateways the fleet had then.
options:
  instances:
    description:
      - What to drain or to let serve, as a list of C(id), C(address) and C(port).
      - One without a port cannot be asked - no wait when it is drained, no proof before it serves again.
    type: list
    elements: dict
    required: true
  state:
    description:
      - V(drained) raises the flags and waits, V(serving) lifts them.
      - V(forgotten) lifts all but those of O(instances), whoever raised them.
      - V(taken_over) raises those of O(drains), on behalf of who raised them there, and notes O(gateways).
    type: str
    choices: [drained, serving, forgotten, taken_over]
    required: true
  drains:
    description: With O(state=taken_over), what RV(drains) is on another gateway.
    type: dict
    default: {}
  gateways:
    description: With O(state=taken_over), the gateways of this run, which RV(gateways) of the next one tells.
    type: list
    elements: str
  owner:
    description:
      - V(operator) may lift every flag, V(rollout) only those of rollouts.
      - For V(rollout) an instance that never says what it works on counts as drained after O(timeout), which must be
        longer than any request, so that a broken one can be replaced.
    type: str
    choices: [operator, rollout]
    default: operator
  by:
    description: Who does it, for the flag and the audit log. Filled in by the action plugin - who runs the playbook.
    type: str
  reason:
    description: Why, for whoever finds the flag.
    type: str
    default: ''
  require_ready:
    description:
      - With O(state=serving), how many seconds an instance may take to answer ready; else its flag stays, and the
        module fails.
    type: float
    default: 0
  down_directory:
    description: Where the agent flags instances that it found down; with O(require_ready) such a flag must be gone too.
    type: path
  wait:
    description:
      - With O(state=drained), whether to wait until the instances work on nothing.
      - Of several gateways only the last one that is told should - any other may be the one that clients ask, and
        sends requests until its own flag is up.
    type: bool
    default: true
  timeout:
    description: With O(state=drained), seconds after which the wait for busy instances ends in an error.
    type: float
    default: 315
  audit:
    description: Further lines for the audit log, written in the same call. O(by) is added to each.
    type: list
    elements: dict
    default: []
  directory:
    description: Where the gateway keeps its state; the flags are files in its folder C(drain).
    type: path
    default: /var/lib/gpufleet-gateway
author: gpufleet contributors
"""

EXAMPLES = r"""
- name: Drain one GPU
  gpufleet.core.drain:
    instances: [{id: cosyvoice2-gpu02-1, address: 192.168.1.11, port: 12322}]
    state: drained
"""

RETURN = r"""
flags:
  description: Ids of the instances whose flag was raised or lifted.
  returned: always
  type: list
  elements: str
drains:
  description: By id of each instance whose flag is raised now, what its flag says.
  returned: O(state=forgotten)
  type: dict
gateways:
  description: The gateways of the last run here; none where there was no run yet.
  returned: O(state=forgotten)
  type: list
  elements: str
silent:
  description: By id of an instance that was taken for drained because nothing answers there, why.
  returned: always
  type: dict
busy:
  description: By id of an instance that was still at work at the time limit, on how many requests or why not known.
  returned: always
  type: dict
kept:
  description: By id of an instance whose flag was not lifted because somebody else raised it, who, when and why.
  returned: always
  type: dict
not_ready:
  description: By id of an instance whose flag was not lifted because it did not get ready, why.
  returned: always
  type: dict
seconds:
  description: How long it took.
  returned: always
  type: float
"""

GATEWAYS = "gateways.json"  # which the fleet had when this one last had the drains of all
POLL_SECONDS = 0.2
#: A request that nginx let in just before the flag was raised has reached its instance by then.
SETTLE_SECONDS = 0.5
#: A lost packet is not a dead host: so many attempts in a row must fail to connect.
CONNECT_ATTEMPTS = 3


class DrainError(Exception):
    """Instances are not as wanted; the message is for the operator."""


@dataclass
class Gateway:
    """The flags of one gateway, raised and lifted on behalf of ``owner`` and ``by``."""

    directory: Path
    owner: str
    by: str
    reason: str = ""

    def flag(self, instance: Instance) -> Path:
        """Return where the flag of an instance is."""
        return self.directory / "drain" / instance.id

    def needs_flag(self, instance: Instance, owner: str | None = None) -> bool:
        """Tell whether there is no flag, or one that an operator takes over from a rollout."""
        found = read_record(self.flag(instance))
        return found is None or ((owner or self.owner) != "rollout" and found.get("owner") == "rollout")

    def raise_flag(self, instance: Instance) -> None:
        """Raise the flag of an instance; nginx looks for it at every request."""
        record = {"owner": self.owner, "by": self.by, "reason": self.reason, "since": utc_now()}
        # An operator who was quicker keeps the flag.
        write_record(self.flag(instance), record, replace=self.owner == "operator")

    def may_lift(self, instance: Instance) -> bool | str:
        """Tell whether a flag is there to be lifted, or why it stays."""
        found = read_record(self.flag(instance))
        if found is None:
            return False
        if self.owner == "operator" or found.get("owner") == "rollout":
            return True
        who, since = found.get("by", "an operator"), found.get("since", "an unknown time")
        return f"drained by {who} since {since}: {found.get('reason') or 'no reason given'}"

    def lift(self, instance: Instance) -> None:
        """Lift the flag of an instance."""
        remove_record(self.flag(instance))


def await_idle(
    instances: Iterable[Instance], timeout: float, give_up_mute: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    """Wait until no instance works on a request; those that wait for one are sent to others.

    An instance that connects but does not answer is busy: an app may hold its event loop for a whole inference. One
    that nothing answers for is dead and has nothing to lose.

    :param give_up_mute: count those that have not said what they work on when ``timeout`` is over as unreachable. With
        a time limit longer than that of a request no client waits for them any more, and else a guard that is broken
        could never be replaced.
    :returns: by id the unreachable ones and why, and the ones still busy after ``timeout`` seconds and with what.
    """
    begun = time.monotonic()
    waiting = {instance.id: instance for instance in instances if instance.port}
    unreachable: dict[str, str] = {}
    busy: dict[str, str] = {}
    misses: dict[str, int] = {}
    mute: set[str] = set()
    while waiting:
        asked = time.monotonic() - begun
        for name, answer in ask_all(waiting.values(), "status").items():
            if not answer.connected:
                misses[name] = misses.get(name, 0) + 1
                if answer.refused or misses[name] >= CONNECT_ATTEMPTS:
                    unreachable[name] = answer.problem
                    del waiting[name]
                continue
            misses[name] = 0
            if answer.problem:
                mute.add(name)
            else:
                mute.discard(name)
            if answer.status.get("waiting"):
                waiting[name].send_away()
            in_flight = answer.status.get("in_flight")
            busy[name] = answer.problem or f"{in_flight} in flight"
            if in_flight == 0 and asked >= SETTLE_SECONDS:
                del waiting[name]
        if time.monotonic() - begun > timeout:
            break
        if waiting:
            time.sleep(POLL_SECONDS)
    if give_up_mute:
        unreachable.update((name, busy[name]) for name in mute & set(waiting))
    return unreachable, {name: busy.get(name, "no connection yet") for name in waiting if name not in unreachable}


def await_ready(instances: Iterable[Instance], timeout: float, down: Path | None = None) -> dict[str, str]:
    """Wait until all instances answer ready and the agent has seen it too.

    :param down: the directory of the agent's flags, where there is an agent.
    :returns: by id of those that do not get there in ``timeout`` seconds, why.
    """
    deadline = time.monotonic() + timeout
    waiting = {instance.id: instance for instance in instances if instance.port}
    while True:
        answers = ask_all(waiting.values(), "ready")
        problems = {
            name: answer.problem and f"it does not answer ready: {answer.problem}" for name, answer in answers.items()
        }
        for name in waiting:
            if not problems[name] and down and (down / name).exists():
                problems[name] = f"the agent has it flagged as down in {down}"
        waiting = {name: instance for name, instance in waiting.items() if problems[name]}
        if not waiting or time.monotonic() > deadline:
            return {name: problems[name] for name in waiting}
        time.sleep(POLL_SECONDS)


def drained(gateway: Gateway, instances: list[Instance], timeout: float | None, check: bool) -> dict[str, Any]:
    """Raise the flags and, with a time limit, wait until the instances are idle; return the module's result."""
    raised = [instance for instance in instances if gateway.needs_flag(instance)]
    unreachable: dict[str, str] = {}
    busy: dict[str, str] = {}
    if not check:
        for instance in raised:
            gateway.raise_flag(instance)
    if not check and timeout is not None:
        unreachable, busy = await_idle(instances, timeout, give_up_mute=gateway.owner == "rollout")
    return {"flags": [instance.id for instance in raised], "silent": unreachable, "busy": busy}


def serving(
    gateway: Gateway, instances: list[Instance], require_ready: float, down: Path | None, check: bool
) -> dict[str, Any]:
    """Lift the flags of instances that are ready; return the module's result."""
    verdicts = {instance.id: gateway.may_lift(instance) for instance in instances}
    flagged = [instance for instance in instances if verdicts[instance.id] is True]
    not_ready = await_ready(flagged, require_ready, down) if require_ready and not check else {}
    lifted = []
    for instance in flagged:
        # Asked again: an operator may have drained it meanwhile.
        verdicts[instance.id] = gateway.may_lift(instance)
        if verdicts[instance.id] is True and instance.id not in not_ready:
            lifted.append(instance)
            if not check:
                gateway.lift(instance)
    kept = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, str)}
    return {"flags": [one.id for one in lifted], "kept": kept, "not_ready": not_ready}


def forgotten(gateway: Gateway, instances: list[Instance], check: bool) -> dict[str, Any]:
    """Lift the flags of what is none of the instances; return the module's result."""
    known = {instance.id for instance in instances}
    flags = gateway.directory / "drain"
    left = sorted(flag.name for flag in flags.iterdir() if flag.name not in known) if flags.is_dir() else []
    if not check:
        for name in left:
            gateway.lift(Instance(name))
    stay = (instance for instance in instances if instance.id not in left)
    drains = {instance.id: record for instance in stay if (record := read_record(gateway.flag(instance))) is not None}
    gateways = (read_record(gateway.directory / GATEWAYS) or {}).get("gateways")
    return {"flags": left, "drains": drains, "gateways": gateways}


def taken_over(
    gateway: Gateway, drains: Mapping[str, Record], gateways: list[str] | None, check: bool
) -> dict[str, Any]:
    """Raise flags as they are on another gateway, where there are none; return the module's result."""
    missing = {
        name: record
        for name, record in drains.items()
        if gateway.needs_flag(Instance(name), record.get("owner", "operator"))
    }
    if not check:
        for name, record in missing.items():
            write_record(gateway.flag(Instance(name)), dict(record), replace=record.get("owner") != "rollout")
        if gateways is not None:  # last: only now this one has what those have
            write_record(gateway.directory / GATEWAYS, {"gateways": gateways})
    return {"flags": sorted(missing)}


#: What a change of flags is called in the audit log, and between which states it leads.
AUDIT = {
    "drained": ("drain", "serving", "drained"),
    "serving": ("undrain", "drained", "serving"),
    "forgotten": ("forget the drain", "drained", None),
    "taken_over": ("take the drain over", "serving", "drained"),
}


def audit_lines(state: str, result: Mapping[str, Any], reason: str) -> list[Record]:
    """Return a line for the audit log for each flag that was raised or lifted."""
    what, before, after = AUDIT[state]

    def outcome(name: str) -> str:
        if name in result["busy"]:
            return f"busy at the time limit: {result['busy'][name]}"
        return f"unreachable: {result['silent'][name]}" if name in result["silent"] else "ok"

    return [
        {
            "what": what,
            "instance": name,
            "from": before,
            "to": after,
            "result": outcome(name),
            "reason": reason,
        }
        for name in result["flags"]
    ]


def run(parameters: Mapping[str, Any], check: bool, warn: Callable[[str], None]) -> dict[str, Any]:
    """Do what the module's parameters ask and return its result.

    :raises DrainError: some instances are still busy, or not ready; ``args[1]`` is the result.
    """
    begun = time.monotonic()
    instances = [
        Instance(str(given["id"]), str(given.get("address") or ""), int(given.get("port") or 0))
        for given in parameters["instances"]
    ]
    gateway = Gateway(Path(parameters["directory"]), parameters["owner"], parameters["by"], parameters["reason"])
    if parameters["state"] == "drained":
        result = drained(gateway, instances, parameters["timeout"] if parameters["wait"] else None, check)
    elif parameters["state"] == "forgotten":
        result = forgotten(gateway, instances, check)
    elif parameters["state"] == "taken_over":
        result = taken_over(gateway, parameters["drains"], parameters["gateways"], check)
    else:
        down = Path(parameters["down_directory"]) if parameters["down_directory"] else None
        result = serving(gateway, instances, parameters["require_ready"], down, check)
    result = {"silent": {}, "busy": {}, "kept": {}, "not_ready": {}, **result}
    result |= {"changed": bool(result["flags"]), "seconds": round(time.monotonic() - begun, 1)}
    if not check:
        own = audit_lines(parameters["state"], result, parameters["reason"]) if gateway.owner == "operator" else []
        lines = [{"by": gateway.by, **line} for line in [*parameters["audit"], *own]]
        try:
            append_audit(gateway.directory, lines)
        except OSError as error:  # a full disk must not leave an instance drained, or serving
            warn(f"The audit log could not be written: {error}. Not in it: {json.dumps(lines)}")
    for name, why in result["silent"].items():
        warn(f"{name} counts as drained, nothing answers there: {why}")
    if result["busy"]:
        who = "; ".join(f"{name}: {what}" for name, what in result["busy"].items())
        raise DrainError(
            f"Still at work after {result['seconds']:.0f} s: {who}. No new request gets there; nothing was stopped. "
            "Wait and run this again, give a longer time limit, or undrain.",
            result,
        )
    if result["not_ready"]:
        who = "; ".join(f"{name}: {why}" for name, why in result["not_ready"].items())
        raise DrainError(f"Not let in again: {who}. It stays drained until undrain.yml.", result)
    return result


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "instances": {"type": "list", "elements": "dict", "required": True},
            "state": {"type": "str", "choices": list(AUDIT), "required": True},
            "drains": {"type": "dict", "default": {}},
            "gateways": {"type": "list", "elements": "str"},
            "owner": {"type": "str", "choices": ["operator", "rollout"], "default": "operator"},
            "by": {"type": "str"},
            "reason": {"type": "str", "default": ""},
            "require_ready": {"type": "float", "default": 0},
            "down_directory": {"type": "path"},
            "wait": {"type": "bool", "default": True},
            "timeout": {"type": "float", "default": 315},
            "audit": {"type": "list", "elements": "dict", "default": []},
            "directory": {"type": "path", "default": "/var/lib/gpufleet-gateway"},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module.params, module.check_mode, module.warn)
    except DrainError as error:
        message, result = error.args
        module.fail_json(msg=message, **result)
    except OSError as error:
        module.fail_json(msg=f"The flags could not be changed: {error}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()

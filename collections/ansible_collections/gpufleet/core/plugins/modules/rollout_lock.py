#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Ansible module: one changing run at a time, by a lock file on the gateway."""

from __future__ import annotations

from collections.abc import Mapping
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

DOCUMENTATION = r"""
module: rollout_lock
short_description: Let one run at a time change the fleet
description:
  - Runs on the first gateway and keeps there who changes the fleet since when. A second run is told that, and how to
    break the lock.
  - A run that failed leaves its lock behind. The next run of the same controller sees that its process has ended and
    takes the lock over.
options:
  state:
    description: V(held) takes the lock, V(free) gives it back.
    type: str
    choices: [held, free]
    required: true
  what:
    description: What the run does, for whoever finds the lock.
    type: str
    default: ''
  break_lock:
    description: Take the lock whoever holds it.
    type: bool
    default: false
  holder:
    description:
      - Who asks, as C(by), C(controller), C(pid) and C(started). Filled in by the action plugin - the process of
        ansible-playbook, which no module can see.
    type: dict
  ended:
    description: A holder of the lock that the action plugin knows to have ended.
    type: dict
  directory:
    description: Where the gateway keeps its state.
    type: path
    default: /var/lib/gpufleet-gateway
author: gpufleet contributors
"""

EXAMPLES = r"""
- name: Let no other run change the fleet meanwhile
  gpufleet.core.rollout_lock:
    state: held
    what: site.yml
"""

RETURN = r"""
holder:
  description: The lock's holder - this run, or in a failure the one that it is told of.
  returned: always
  type: dict
taken_over:
  description: The former holder whose lock was broken or taken over, if any.
  returned: success
  type: dict
"""

#: What tells one run from another.
IDENTITY = ("controller", "pid", "started")


class Locked(Exception):
    """Another run holds the lock; ``args[1]`` is its record."""


def is_same_run(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    """Tell whether two records name the same process of the same controller."""
    return one is not None and all(str(one.get(key)) == str(other.get(key)) for key in IDENTITY)


def describe(holder: Mapping[str, Any]) -> str:
    """Say who holds a lock, since when, and what for."""
    who, what = holder.get("by", "somebody"), holder.get("what", "an unknown run")
    since, pid = holder.get("since", "an unknown time"), holder.get("pid", "unknown")
    return f"{who} is changing the fleet since {since}: {what}, process {pid} on {holder.get('controller', 'unknown')}"


def hold(path: Path, holder: Record, ended: Mapping[str, Any] | None, force: bool, check: bool) -> dict[str, Any]:
    """Take the lock and return the module's result.

    :param ended: a former holder that is known to have ended; its lock may be taken over.
    :raises Locked: another run holds it.
    """
    found = read_record(path)
    if is_same_run(found, holder):
        return {"changed": False, "holder": found, "taken_over": None}
    may_take_over = found is None or force or (ended is not None and is_same_run(found, ended))
    record = {**holder, "since": utc_now()}
    if may_take_over and not check:
        may_take_over = write_record(path, record, replace=found is not None)
        record = read_record(path) or {}
    if not may_take_over or not is_same_run(record, holder):
        current = read_record(path) or found or {}
        raise Locked(
            f"{describe(current)}. Wait for its end; if it has died, add -e break_lock=true to take the lock over.",
            current,
        )
    if found is not None and not check:
        what = {"what": "lock taken over", "from": describe(found), "to": holder.get("what", "")}
        append_audit(path.parent, [{"by": holder["by"], **what, "result": "broken" if force else "its run had ended"}])
    # Taking and freeing is no change of the fleet: a run that finds nothing to do stays changed=0.
    return {"changed": False, "holder": record, "taken_over": found}


def free(path: Path, holder: Record, check: bool) -> dict[str, Any]:
    """Give the lock back and return the module's result. A check run has none: what is there is another run's.

    :raises Locked: it has been broken meanwhile, so two runs may have changed the fleet.
    """
    found = read_record(path)
    if not check:
        if found is not None and not is_same_run(found, holder):
            raise Locked(f"The lock of this run was broken meanwhile. {describe(found)}.", found)
        remove_record(path)
    return {"changed": False, "holder": found or {}, "taken_over": None}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["held", "free"], "required": True},
            "what": {"type": "str", "default": ""},
            "break_lock": {"type": "bool", "default": False},
            "holder": {"type": "dict"},
            "ended": {"type": "dict"},
            "directory": {"type": "path", "default": "/var/lib/gpufleet-gateway"},
        },
        supports_check_mode=True,
    )
    path = Path(module.params["directory"]) / "lock.json"
    holder = {**module.params["holder"], "what": module.params["what"]}
    try:
        if module.params["state"] == "held":
            ended, force = module.params["ended"], module.params["break_lock"]
            result = hold(path, holder, ended, force, module.check_mode)
        else:
            result = free(path, holder, module.check_mode)
    except Locked as locked:
        message, current = locked.args
        module.fail_json(msg=message, holder=current)
    except OSError as error:
        module.fail_json(msg=f"{path} cannot be changed: {error}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()

#!/usr/bin/python
# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Ansible module: ask instances, all at a time, what they are doing and whether they answer a real request."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.instances import Instance

DOCUMENTATION = r"""
module: instance_check
short_description: Ask instances what they are doing and whether they answer a real request
description:
  - Runs on a gateway, which reaches the instances as client requests do. Changes nothing.
options:
  instances:
    description:
      - A list of C(id), C(address), C(port), and to try them out C(smoke) (C(path), C(body), C(content_type)) with
        C(timeout) in seconds.
    type: list
    elements: dict
    required: true
author: gpufleet contributors
"""

EXAMPLES = r"""
- name: Ask one instance
  gpufleet.core.instance_check:
    instances: [{id: cosyvoice2-gpu02-1, address: 192.168.1.11, port: 12322}]
"""

RETURN = r"""
instances:
  description:
    - By id, C(status) (the guard's document, empty where it does not answer), and in words what is wrong with it
      (C(problem)) and with its answer to the smoke request (C(smoke)); empty where nothing is.
  returned: always
  type: dict
"""


def check(given: Mapping[str, Any]) -> dict[str, Any]:
    """Ask one instance."""
    instance = Instance(str(given["id"]), str(given["address"]), int(given["port"]))
    answer = instance.ask("status")
    state = answer.status.get("state")
    problem = answer.problem or ("" if state == "ready" else f"its state is {state}")
    tried = given.get("smoke") and not answer.problem
    smoke = (
        instance.try_out(given["smoke"], float(given["timeout"])) if tried else problem if given.get("smoke") else ""
    )
    return {"status": answer.status, "problem": problem, "smoke": smoke}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"instances": {"type": "list", "elements": "dict", "required": True}}, supports_check_mode=True
    )
    given = module.params["instances"]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(check, given))
    module.exit_json(changed=False, instances={str(one["id"]): answer for one, answer in zip(given, answers)})


if __name__ == "__main__":
    main()

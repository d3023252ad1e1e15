# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Jinja filters for the templates of Supervisor programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.core.plugins.module_utils.supervisor_config import supervisor_environment


def environment(variables: Mapping[str, object]) -> str:
    """Write a dict as the value of ``environment =``; numbers become text."""
    try:
        return supervisor_environment({str(name): str(value) for name, value in variables.items()})
    except ValueError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """Filters ``gpufleet.core.*``."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Name the filters of this module."""
        return {"supervisor_environment": environment}

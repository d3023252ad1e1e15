"""Filters conda_releases and code_releases: where each release is, from what lies in the project alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.gpufleet.core.plugins.module_utils.archive import ArchiveError
from ansible_collections.gpufleet.core.plugins.module_utils.release_ids import SourceError, code_release, conda_release
from ansible_collections.gpufleet.core.plugins.plugin_utils.project import PROJECT

Releases = dict[str, dict[str, str]]


def conda_releases(envs: Mapping[str, Any], root: str, suffix: str = "tar.gz", project: str = str(PROJECT)) -> Releases:
    """Releases of environments (name -> {lock: folder}), by name: {name, id, root, path, link, archive}.

    root is the folder of all environments on the hosts, suffix the kind of archive.
    """
    try:
        return {name: conda_release(name, env["lock"], root, project, suffix) for name, env in envs.items()}
    except SourceError as error:
        raise AnsibleFilterError(str(error)) from error


def code_releases(services: Mapping[str, Any], root: str, project: str = str(PROJECT)) -> Releases:
    """Releases of services (name -> {code: {source, version}}), by name: {name, id, root, path, link, archive}."""
    try:
        return {name: code_release(name, service["code"], root, project) for name, service in services.items()}
    except (SourceError, ArchiveError, OSError) as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """What Ansible looks for in a filter plugin."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Filters by name."""
        return {"conda_releases": conda_releases, "code_releases": code_releases}

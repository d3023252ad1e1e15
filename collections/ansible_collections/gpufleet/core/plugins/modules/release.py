#!/usr/bin/python
"""Module gpufleet.core.release: a release is on the host, whole, and a link points at it."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.gpufleet.core.plugins.module_utils.archive import ArchiveError
from ansible_collections.gpufleet.core.plugins.module_utils.release import (
    ReleaseError,
    Store,
    Wanted,
    contents_text,
    deploy,
)

DOCUMENTATION = r"""
module: release
short_description: One release is on the host, whole, and a link points at it
description:
  - Brings an archive that C(tools.condaenv) or C(tools.pack) made to the host, checks its sha256 and each of its files,
    and replaces the link atomically. A release that is there already is checked against its own manifest and mended.
  - Nothing is copied unless it is missing; a run that changes nothing is one module call.
  - A deployment that fails leaves the host as it was.
options:
  id:
    description: Id of the release. An id that is still on the host needs no archive, which is how one rolls back.
    type: str
    required: true
  root:
    description: Folder of all releases of this thing; the release becomes the folder O(root)/O(id).
    type: path
    required: true
  link:
    description: Symbolic link that points at the release in service.
    type: path
    required: true
  archive:
    description:
      - Archive on the controller (.tar.gz, or .tar.zst with the program C(zstd) on both sides), its sidecar beside it.
      - Left out, the release must be on the host.
    type: path
  activate:
    description: Whether the link is pointed at the release; C(false) only prepares it.
    type: bool
    default: true
  record:
    description: Whether it comes into service as the newest; C(false) for one that is gone back to.
    type: bool
    default: true
  keep:
    description: How many releases that served stay on the host. The current and the previous one always stay.
    type: int
    default: 3
  verify:
    description:
      - How a release on the host is compared with its manifest.
      - V(quick) looks at type, size, executable bit and modification time; V(full) reads and hashes every file.
    type: str
    choices: [quick, full]
    default: quick
  in_use:
    description:
      - Globs of files on the host; a release whose path one of them names is never pruned.
      - Releases that a process runs from never are.
    type: list
    elements: str
    default: []
  sha256:
    description: Hash of the archive; filled in by the action plugin from the sidecar.
    type: str
  contents:
    description: Contents of the release for --diff; filled in by the action plugin from the sidecar.
    type: dict
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
author: gpufleet
"""

EXAMPLES = r"""
- name: Point the environment at its release
  gpufleet.core.release:
    id: 3f9d0c6b1a2e
    root: /opt/conda/releases/tts
    link: /opt/conda/envs/tts
    archive: dist/conda-tts-3f9d0c6b1a2e.tar.gz

- name: Roll back to a release that is still on the host
  gpufleet.core.release:
    id: 81c0ffee42aa
    root: /opt/conda/releases/tts
    link: /opt/conda/envs/tts
    record: false
"""

RETURN = r"""
id: {description: Id of the release., type: str, returned: success}
path: {description: Folder of the release., type: str, returned: success}
current: {description: Id that the link points at after the run., type: str, returned: success}
previous: {description: Id of the release that came into service before that., type: str, returned: success}
pruned: {description: Ids removed from the host., type: list, elements: str, returned: success}
drift: {description: "Files missing, added or edited, as C(path: how).", type: list, elements: str, returned: success}
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "id": {"type": "str", "required": True},
            "root": {"type": "path", "required": True},
            "link": {"type": "path", "required": True},
            "archive": {"type": "path"},
            "activate": {"type": "bool", "default": True},
            "record": {"type": "bool", "default": True},
            "keep": {"type": "int", "default": 3},
            "verify": {"type": "str", "choices": ["quick", "full"], "default": "quick"},
            "in_use": {"type": "list", "elements": "str", "default": []},
            "sha256": {"type": "str"},
            "contents": {"type": "dict"},
        },
        required_together=[("archive", "sha256")],
        supports_check_mode=True,
    )
    params = module.params
    wanted = Wanted(
        id=params["id"],
        archive=Path(params["archive"]) if params["archive"] else None,
        sha256=params["sha256"],
        activate=params["activate"],
        record=params["record"],
        keep=params["keep"],
        full=params["verify"] == "full",
        in_use=tuple(params["in_use"]),
    )
    try:
        store = Store(params["root"], params["link"])
        before = store.current()
        before_contents = store.contents(before) if module._diff else {}
        result = deploy(store, wanted, module.check_mode)
        if module._diff:
            after_contents = params["contents"] or store.contents(wanted.id)
            result["diff"] = _diff(before, before_contents, after_contents, result)
    except (ReleaseError, ArchiveError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


def _diff(before: str | None, old: dict[str, str], new: dict[str, str], result: dict) -> list[dict[str, str]]:
    """The two things that can differ: what the link points at, and the files of the release itself."""
    if before == result["id"]:
        new = old
    return [
        {
            "before_header": f"in service: {before}",
            "after_header": f"{'in service' if result['current'] == result['id'] else 'prepared'}: {result['id']}",
            "before": contents_text(old),
            "after": contents_text(new),
        },
        {
            "before_header": f"{result['path']}: drift",
            "after_header": f"{result['path']}: whole",
            "before": "".join(f"{line}\n" for line in result["drift"]),
            "after": "",
        },
    ]


if __name__ == "__main__":
    main()

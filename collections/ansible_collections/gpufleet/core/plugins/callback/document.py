# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Callback gpufleet.core.document: what people read, and with -e output=json one JSON document for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

from ansible.plugins.callback.default import CallbackModule as Default

DOCUMENTATION = r"""
name: document
type: stdout
short_description: Ansible's default output, and one JSON document for programs
description:
  - With C(-e output=json) standard output is the document that the playbook handed over as C(document) by
    M(ansible.builtin.set_stats), on one line, and nothing else. All that people read goes to standard error.
  - A playbook that ended before it had a document prints none; its exit code is not 0 then.
extends_documentation_fragment:
  - default_callback
  - result_format_callback
"""


class CallbackModule(Default):
    """The default output with a second reader."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "gpufleet.core.document"

    def __init__(self) -> None:
        super().__init__()
        self._programs: Any = None

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Make way for the document before the first line is printed."""
        if self._programs is None and play.get_variable_manager().extra_vars.get("output") == "json":
            self._programs, sys.stdout = sys.stdout, sys.stderr
        super().v2_playbook_on_play_start(play)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print the document at the very end."""
        super().v2_playbook_on_stats(stats)
        document = stats.custom.get("_run", {}).get("document")
        if self._programs is not None and document is not None:
            print(json.dumps(document, ensure_ascii=False), file=self._programs, flush=True)

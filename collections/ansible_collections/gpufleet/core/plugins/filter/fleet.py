# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Jinja filters on the fleet that :mod:`module_utils.fleet` derives from the inventory, and on what watches it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.gpufleet.core.plugins.module_utils.fleet import derive
from ansible_collections.gpufleet.core.plugins.module_utils.monitoring import alert_rules, scrape_targets


class FilterModule:
    """Filters ``gpufleet.core.*``."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Name the filters of this module."""
        return {"fleet": derive, "scrape_targets": scrape_targets, "alert_rules": alert_rules}

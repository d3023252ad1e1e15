"""Rendering a template in a process of its own: nothing of a collection may be imported here."""

from __future__ import annotations

import time
from typing import Any

from tests.templates.render import files_made, render

__all__ = ["files_made", "timed_render"]


def timed_render(role: str, template: str, fleet: dict[str, Any], variables: dict[str, Any]) -> tuple[str, float]:
    """The text of a role's template for a fleet, and the seconds that it took."""
    began = time.perf_counter()
    text = render(role, template, fleet, **variables)
    return text, time.perf_counter() - began

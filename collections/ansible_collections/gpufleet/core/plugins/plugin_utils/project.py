# Copyright gpufleet contributors. Licensed under the Apache License 2.0.
"""Where the project is, on the controller."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[6]
"""Folder of site.yml, where relative folders start. The collection lies in it; no variable names it in every play."""

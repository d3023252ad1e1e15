"""Command lines of the controller: python -m tools.NAME, started in the project's folder."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
"""Folder of site.yml."""

# what the tools share with the filters and the hosts' modules lives in the collection
sys.path.insert(0, str(PROJECT / "collections"))

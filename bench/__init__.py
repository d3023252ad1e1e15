"""Benchmarks: what gpufleet costs and gains, measured beside what people would use instead."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

# The fleet is derived by what the collection's filters and modules share.
sys.path.insert(0, str(PROJECT / "collections"))

"""The fault matrix: one fault after the other on a fleet under load, every request reconciled with every inference.

`make faults` runs all rows in Docker, and those that apply beside rivals on loopback, and writes docs/faults.md and
docs/faults.json; `python -m tests.fleet.faults --only NAME` runs some of them anew.
"""

"""fleet_agent: asks every GPU instance how it is and keeps requests away from those that cannot serve.

Standard library only, Python 3.9 or newer; run it as `python3 -m fleet_agent`. It is not in the data path: it raises
and clears flag files that the gateway honours, and where it dies the flags stay as they are.
"""

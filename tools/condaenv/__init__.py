"""Conda environments: locked once, built once on the controller, shipped as one archive.

A host needs neither conda nor a network for them. The build links packages and wheels, all by hash, for the very folder
where the hosts will have them; the role conda_env brings the archive there (module gpufleet.core.release).
"""


class CondaError(Exception):
    """The environment cannot be locked or built; the message is for the operator."""

"""What the unit tests need besides Python."""

import pytest
from hypothesis import HealthCheck, settings

from testbed.shell import provide

# A busy machine fails no test: neither by a slow example nor by slow making of examples.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    """The engine that speaks, as the service's hosts have it."""
    provide({"espeak-ng": "espeak-ng"})

"""What the unit tests need besides Python."""

import pytest

from testbed.shell import provide


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    """The engine that speaks, as the service's hosts have it."""
    provide({"espeak-ng": "espeak-ng"})

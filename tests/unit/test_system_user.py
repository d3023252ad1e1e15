"""Whether a system user is as wanted, by its line of the user database."""

import pytest
from ansible_collections.gpufleet.core.plugins.action.system_user import is_as_wanted

WANTED = {"name": "gpufleet", "comment": "GPU instances", "home": "/var/lib/gpufleet", "shell": "/usr/sbin/nologin"}
ENTRY = "gpufleet:x:998:998:GPU instances:/var/lib/gpufleet:/usr/sbin/nologin\n"


def test_one_as_wanted_needs_no_module() -> None:
    assert is_as_wanted(ENTRY, WANTED)


@pytest.mark.parametrize("field", WANTED)
def test_one_that_differs_does(field: str) -> None:
    assert not is_as_wanted(ENTRY, {**WANTED, field: "other"})


def test_one_that_is_not_there_does() -> None:
    assert not is_as_wanted("", WANTED)

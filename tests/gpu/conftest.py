"""The tests of this directory see the machine's GPUs, which are hidden from all others."""

import pytest

from tests import launching


@pytest.fixture(scope="module", autouse=True)
def sees_gpus():
    """For a module, as what its tests have in common is run once in it."""
    launching.hides_gpus = False
    yield
    launching.hides_gpus = True

"""Short forms of the drills of kills and of damage."""

import pytest

from tests.drills import corruption, kills


def test_damage_is_gone_round():
    found = list(corruption.drills(30, real=0))
    assert [drill.times for drill in found] == [10, 10, 10]
    assert not [failure for drill in found for failure in drill.failures]


@pytest.mark.long
def test_killed_and_resumed_to_the_bit():
    found = list(kills.drills(4, recipes=["linear_regression_torch"]))
    assert sum(drill.times for drill in found) == 4
    assert not [failure for drill in found for failure in drill.failures]

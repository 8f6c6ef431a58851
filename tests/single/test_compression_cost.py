"""From which bandwidth down compression pays."""

import math

import pytest

from toolkit import compression
from toolkit.compression.cost import Cost, measure, pays_below
from toolkit.errors import UsageError

NONE = Cost("none", 0.004, 100_000_000)


def seconds_on(mbit_per_second, cost):
    return cost.seconds + cost.bytes_sent * 8 / (mbit_per_second * 1e6)


@pytest.mark.parametrize(
    "cost", [Cost("fp16", 0.1, 50_000_000), Cost("topk", 0.07, 2_000_000), Cost("a", 9.0, 99_999_999)]
)
def test_below_the_limit_a_step_is_shorter_and_above_it_longer(cost):
    limit = pays_below(cost, NONE)
    assert seconds_on(0.99 * limit, cost) < seconds_on(0.99 * limit, NONE)
    assert seconds_on(1.01 * limit, cost) > seconds_on(1.01 * limit, NONE)


def test_what_spares_nothing_never_pays_and_what_costs_nothing_always():
    assert pays_below(Cost("topk", 0.001, 100_000_001), NONE) == 0
    assert pays_below(NONE, NONE) == 0
    assert pays_below(Cost("fp16", 0.004, 99), NONE) == math.inf


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_scheme_is_measured(size):
    shapes = [(40, 30), (30,), ()]
    costs = measure(compression.NAMES, shapes, size, repetitions=2)
    for cost, name in zip(costs, compression.NAMES, strict=True):
        assert cost.name == name and cost.seconds > 0
        assert cost.bytes_sent == compression.make(name, shapes).bytes_per_step(size)
    with pytest.raises(UsageError, match="zip"):
        measure(["zip"], shapes, size)

"""What compression costs."""

import pytest

from toolkit import compression
from toolkit.compression.cost import measure
from toolkit.errors import UsageError


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_scheme_is_measured(size):
    shapes = [(40, 30), (30,), ()]
    costs = measure(compression.NAMES, shapes, size, repetitions=2)
    for cost, name in zip(costs, compression.NAMES, strict=True):
        assert cost.name == name and cost.seconds > 0
        assert cost.bytes_sent == compression.make(name, shapes).bytes_per_step(size)
    with pytest.raises(UsageError, match="zip"):
        measure(["zip"], shapes, size)

"""What `hvdkit plan` predicts for slow links between hosts, against runs over them."""

import pytest

from tests.benchmarks import plan_check
from tests.hosts import results

TABLE = (
    "Seconds of a step of `cnn_torch` over links of 8 Mbit/s and 5 ms, as `hvdkit plan` predicts them and as measured"
)
# Far over what the machine's noise can make of a step that takes a tenth of a second for its messages alone, and far
# below the links' part in it.
FACTOR = 1.6


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_plan_over_slow_links(cluster):
    for what, predicted, (measured,) in plan_check.over_slow_links(cluster, runs=1):
        results.note(TABLE, what, "predicted", f"{predicted:.3f}")
        results.note(TABLE, what, "measured", f"{measured:.3f}")
        assert measured / FACTOR < predicted < measured * FACTOR, (what, predicted, measured)

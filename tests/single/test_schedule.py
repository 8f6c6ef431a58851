"""Learning-rate scaling and warm-up against figures worked out by hand."""

import pytest

from toolkit import schedule
from toolkit.errors import UsageError
from toolkit.options import RunOptions
from toolkit.run import Run
from toolkit.world import World


def test_warmup_is_linear_and_then_constant():
    factors = [schedule.warmup(step, 4, 0.25) for step in range(6)]
    assert factors == [0.25, 0.4375, 0.625, 0.8125, 1.0, 1.0]
    assert schedule.warmup(0, 0, 0.25) == 1.0


def test_linear_scale():
    assert schedule.linear_scale(256, 64) == 4.0
    with pytest.raises(UsageError, match="0 and 64"):
        schedule.linear_scale(0, 64)


def test_a_batch_per_worker_scales_the_rate_and_a_global_batch_does_not():
    world = World(0, 4)
    for options, batch, rates in (
        (RunOptions(), 32, [0.02, 0.02, 0.02]),
        (RunOptions(batch_size=16, warmup_epochs=2), 64, [0.02, 0.02 + 0.06 / 4, 0.08]),  # 2 steps an epoch
        (RunOptions(batch_size=60, warmup_epochs=0), 128, [0.02 * 128 / 60] * 3),  # no more samples than there are
    ):
        run = Run(options, world, None, None, None, samples=128)
        assert run.sharding.global_batch_size == batch
        found = []
        for step in (0, 1, 4):
            run._at.step = step
            found.append(run.learning_rate())
        assert found == pytest.approx(rates)

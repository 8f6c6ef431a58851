"""Sharding: every sample once in an epoch, equal steps on all ranks, exact weights."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.sharding import Sharding, block

shardings = st.builds(
    Sharding,
    samples=st.integers(1, 200),
    global_batch_size=st.integers(1, 250),
    size=st.integers(1, 17),
    seed=st.integers(0, 2**32 - 1),
    accumulation_steps=st.integers(1, 4),
)


def consumed(sharding, epoch):
    """(step, part) of everything that an epoch's ranks are given."""
    for rank in range(sharding.size):
        parts = list(sharding.parts(epoch, rank))
        assert len(parts) == sharding.steps_per_epoch * sharding.accumulation_steps
        for number, part in enumerate(parts):
            yield number // sharding.accumulation_steps, part


@settings(max_examples=2000, deadline=None)
@given(shardings, st.integers(0, 1000))
def test_every_sample_once_and_no_part_empty(sharding, epoch):
    seen = []
    for _, part in consumed(sharding, epoch):
        assert len(part.indices) >= 1
        if part.weight:
            seen.extend(part.indices)
    assert sorted(seen) == list(range(sharding.samples))


@settings(max_examples=500, deadline=None)
@given(shardings, st.integers(0, 1000))
def test_weighted_means_average_to_the_global_mean(sharding, epoch):
    values = np.random.default_rng(epoch).normal(size=sharding.samples)
    order = sharding.order(epoch)
    passes = sharding.size * sharding.accumulation_steps
    means = np.zeros(sharding.steps_per_epoch)
    for step, part in consumed(sharding, epoch):
        means[step] += part.weight * values[part.indices].mean() / passes
    for step, mean in enumerate(means):
        size = sharding.global_batch_size
        assert np.isclose(mean, values[order[step * size : (step + 1) * size]].mean(), rtol=1e-12, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(shardings, st.integers(0, 1000), st.integers(1, 17))
def test_global_batches_do_not_depend_on_the_number_of_ranks(sharding, epoch, size):
    other = Sharding(sharding.samples, sharding.global_batch_size, size, sharding.seed, 1)
    assert np.array_equal(sharding.order(epoch), other.order(epoch))


@given(shardings, st.integers(0, 9), st.integers(0, 5))
def test_an_epoch_taken_up_in_the_middle_goes_on_the_same(sharding, epoch, step):
    whole = [part.indices.tolist() for part in sharding.parts(epoch, 0)]
    rest = [part.indices.tolist() for part in sharding.parts(epoch, 0, step)]
    assert rest == whole[step * sharding.accumulation_steps :]


def test_equal_parts_weigh_exactly_one():
    assert {part.weight for _, part in consumed(Sharding(64, 32, 4, accumulation_steps=2), 0)} == {1.0}


def test_epochs_differ_and_seeds_differ():
    first = Sharding(100, 10, 1)
    assert not np.array_equal(first.order(0), first.order(1))
    assert not np.array_equal(first.order(0), Sharding(100, 10, 1, seed=1).order(0))


@given(st.integers(0, 1000), st.integers(1, 40))
def test_blocks_cover_everything_in_order(samples, size):
    joined = [i for rank in range(size) for i in range(samples)[block(samples, rank, size)]]
    assert joined == list(range(samples))
    lengths = [len(range(samples)[block(samples, rank, size)]) for rank in range(size)]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("field", ["samples", "global_batch_size", "size", "accumulation_steps"])
def test_zero_is_refused(field):
    values = {"samples": 1, "global_batch_size": 1, "size": 1, "accumulation_steps": 1, field: 0}
    with pytest.raises(UsageError, match=f"{field.replace('_', ' ')} is 0"):
        Sharding(**values)

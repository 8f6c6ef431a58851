"""Sharding: every sample once in an epoch, equal steps on all ranks, exact weights."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UsageError
from toolkit.sharding import Sharding, block, k_fold

shardings = st.builds(
    Sharding,
    samples=st.integers(1, 200),
    global_batch_size=st.integers(1, 250),
    size=st.integers(1, 17),
    seed=st.integers(0, 2**32 - 1),
    accumulation_steps=st.integers(1, 4),
    kind=st.sampled_from(["random", "sequential"]),
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
    batches = list(sharding.global_batches(epoch))
    passes = sharding.size * sharding.accumulation_steps
    means = np.zeros(sharding.steps_per_epoch)
    for step, part in consumed(sharding, epoch):
        means[step] += part.weight * values[part.indices].mean() / passes
    for step, mean in enumerate(means):
        assert np.isclose(mean, values[batches[step]].mean(), rtol=1e-12, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(shardings, st.integers(0, 1000), st.integers(1, 17))
def test_global_batches_do_not_depend_on_the_number_of_ranks(sharding, epoch, size):
    other = replace(sharding, size=size, accumulation_steps=1)
    batches = zip(sharding.global_batches(epoch), other.global_batches(epoch), strict=True)
    for step, (batch, same) in enumerate(batches):
        assert np.array_equal(batch, same)
        parts = [next(other.parts(epoch, rank, step)) for rank in range(size)]
        used = np.concatenate([part.indices for part in parts if part.weight])
        assert sorted(used) == sorted(batch) and len(batch) <= sharding.global_batch_size


@given(shardings, st.integers(0, 9), st.integers(0, 5))
def test_an_epoch_taken_up_in_the_middle_goes_on_the_same(sharding, epoch, step):
    whole = [part.indices.tolist() for part in sharding.parts(epoch, 0)]
    rest = [part.indices.tolist() for part in sharding.parts(epoch, 0, step)]
    assert rest == whole[step * sharding.accumulation_steps :]


def test_equal_parts_weigh_exactly_one():
    assert {part.weight for _, part in consumed(Sharding(64, 32, 4, accumulation_steps=2), 0)} == {1.0}


def test_epochs_differ_and_seeds_differ():
    def order(epoch, seed=0, kind="random"):
        return np.concatenate(list(Sharding(100, 10, 1, seed, kind=kind).global_batches(epoch))).tolist()

    assert order(0) != order(1) and order(0) != order(0, seed=1)
    assert order(0, kind="sequential") == order(1, seed=1, kind="sequential")


@settings(max_examples=500, deadline=None)
@given(shardings, st.integers(0, 9))
def test_in_sequence_a_rank_takes_its_own_block_alone(sharding, epoch):
    sharding = replace(sharding, kind="sequential")
    lengths = []
    for rank in range(sharding.size):
        own = range(sharding.samples)[block(sharding.samples, rank, sharding.size)]
        parts = list(sharding.parts(epoch, rank))
        used = [index for part in parts if part.weight for index in part.indices]
        assert sorted(used) == list(own)
        if own:  # one that has none borrows a sample of weight 0
            assert {index for part in parts for index in part.indices} == set(own)
        lengths += [len(part.indices) if part.weight else 0 for part in parts]
    assert max(lengths) - min(lengths) <= 1, "ranks have equal work"


@settings(max_examples=500, deadline=None)
@given(st.integers(2, 300), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_folds_hold_out_every_sample_once(samples, folds, seed):
    folds = min(folds, samples)
    held = []
    for fold in range(folds):
        train, held_out = k_fold(samples, folds, fold, seed)
        assert sorted([*train, *held_out]) == list(range(samples))
        held.append(held_out)
    assert sorted(np.concatenate(held)) == list(range(samples))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_folds_are_drawn_at_random_from_the_seed_alone():
    assert not np.array_equal(k_fold(100, 5, 0)[1], np.arange(20))
    assert not np.array_equal(k_fold(100, 5, 0)[1], k_fold(100, 5, 0, seed=1)[1])
    assert np.array_equal(k_fold(100, 5, 0)[1], k_fold(100, 5, 0)[1])


@pytest.mark.parametrize(("folds", "fold"), [(1, 0), (11, 0), (5, 5), (5, -1)])
def test_impossible_folds_are_refused(folds, fold):
    with pytest.raises(UsageError, match=f"{folds}"):
        k_fold(10, folds, fold)


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


def test_an_unknown_kind_is_refused():
    with pytest.raises(UsageError, match="'sorted'.*random, sequential"):
        Sharding(10, 2, 1, kind="sorted")

"""A sample's random numbers depend on seed, epoch and sample, and on nothing else."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.random_streams import sample_generator, sample_seeds

places = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.integers(0, 2**40))


@settings(max_examples=300, deadline=None)
@given(places, places)
def test_streams_differ_unless_seed_epoch_and_sample_are_the_same(one, other):
    numbers = [sample_generator(*place).random(4).tolist() for place in (one, one, other)]
    assert numbers[0] == numbers[1]
    assert (numbers[0] == numbers[2]) == (one == other)
    seeds = [sample_seeds(seed, epoch, [index])[0] for seed, epoch, index in (one, one, other)]
    assert seeds[0] == seeds[1] and (seeds[0] == seeds[2]) == (one == other)


def test_seeds_do_not_depend_on_the_company():
    assert sample_seeds(3, 1, [5, 9]).tolist() == [sample_seeds(3, 1, [i])[0] for i in (5, 9)]


def test_first_numbers_over_samples_epochs_and_seeds_are_uniform_and_uncorrelated():
    first = np.array(
        [[sample_generator(s, e, i).random() for i in range(50)] for s, e in itertools.product(range(10), range(10))]
    )
    # Standard error of a mean of 5,000 uniform numbers: 0.0041.
    assert abs(first.mean() - 0.5) < 0.02 and abs(first.var() - 1 / 12) < 0.01
    correlations = np.corrcoef(first) - np.eye(100)
    assert np.abs(correlations).max() < 0.65  # of 50 pairs; 4.6 standard errors

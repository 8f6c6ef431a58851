"""The statistics of `hvdkit tune`, against answers worked out another way."""

import itertools

import numpy as np
import pytest

from toolkit import paired

W, L = 0.9, 1.05  # a pair that the candidate wins, and one that it loses


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], None),
        ([W], None),
        ([W, W], None),
        ([W, W, W], True),
        ([L], None),
        ([L, L], False),
        ([L, W, L], False),
        ([W, W, L, L], None),
        ([L, W, W, W, W, W], None),
        ([L, W, W, W, W, W, W], True),
        ([0.995, 0.999], False),  # a gain too small to be worth a setting
        ([1.0, 1.0], False),
    ],
)
def test_when_to_stop(pairs, expected):
    assert paired.verdict(pairs) is expected


def rate_of_taking(win_probability, most=8):
    """How often a candidate is taken that wins each pair with this probability: over all sequences of pairs."""
    taken = 0.0
    for outcomes in itertools.product([W, L], repeat=most):
        told = next((v for n in range(1, most + 1) if (v := paired.verdict(outcomes[:n])) is not None), False)
        wins = outcomes.count(W)
        taken += told * win_probability**wins * (1 - win_probability) ** (most - wins)
    return taken


def test_the_search_takes_what_is_better_and_seldom_what_is_not():
    assert rate_of_taking(0.9) > 0.85
    assert rate_of_taking(0.5) < 0.2
    assert rate_of_taking(0.3) < 0.05


@pytest.mark.parametrize(
    ("n", "confidence", "low", "high"), [(5, 30 / 32, 0, 4), (7, 126 / 128, 0, 6), (8, 238 / 256, 1, 6)]
)
def test_the_interval_of_few_pairs_is_that_of_the_sign_tests_tables(n, confidence, low, high):
    ratios = [1 + 0.01 * i for i in range(n)]
    found = paired.gain(np.random.default_rng(n).permutation(ratios))
    assert found.confidence == pytest.approx(confidence)
    assert (found.low, found.high) == (ratios[low], ratios[high])
    assert found.ratio == pytest.approx(np.median(ratios)) and found.pairs == n


@pytest.mark.parametrize("n", [5, 6, 8, 13])
def test_the_interval_holds_the_true_median_as_often_as_it_says(n):
    generator = np.random.default_rng(n)
    draws = np.exp(generator.standard_t(2, size=(4000, n)) * 0.1)  # of median 1, with long tails
    found = [paired.gain(ratios) for ratios in draws]
    held = np.mean([gain.low <= 1 <= gain.high for gain in found])
    assert held == pytest.approx(found[0].confidence, abs=0.015) and found[0].confidence >= 0.9
    # Of what is no faster at most half of the misses are on the side that would be told as a gain.
    assert np.mean([gain.is_faster for gain in found]) < 0.06


def test_no_difference_is_no_gain_and_a_plain_one_is():
    assert not paired.gain([1.01, 0.97, 0.99, 1.03, 0.98, 1.0, 0.96, 1.02]).is_faster
    assert not paired.gain([0.5, 0.5, 0.5, 0.5]).is_faster, "four pairs can't tell with 90 %"
    assert not paired.gain([1.0] * 8).is_faster
    assert paired.gain([0.9, 0.92, 0.88, 0.91, 0.9]).is_faster
    assert paired.gain([0.9, 0.92, 0.88, 0.91, 0.9, 0.93, 0.9, 1.7]).is_faster, "one run in eight may be disturbed"


def test_hopeless_is_what_no_further_pair_can_save():
    assert not paired.is_hopeless([0.9], 5) and paired.is_hopeless([0.9, 1.1], 5)
    assert not paired.is_hopeless([1.1], 8) and paired.is_hopeless([1.1, 1.2], 8)
    for pairs in (5, 8):
        for ratios in itertools.product([W, L], repeat=pairs):
            cut = any(paired.is_hopeless(ratios[:n], pairs) for n in range(1, pairs + 1))
            assert cut != paired.gain(ratios).is_faster

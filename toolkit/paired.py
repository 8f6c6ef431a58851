"""Whether one of two things is faster, from pairs of measurements taken one after the other.

What slows a whole machine down for a while slows both of a pair, so that their ratio stays. Nothing is assumed of
how ratios are distributed: only whether they are below a bound, and their order, is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIN = 0.99  # a ratio below it counts as faster: a gain of less than 1 % is not worth a setting
_FASTER = 0.9  # share of the pairs that something worth having wins; without a difference it is a half or less
_WRONGLY_TAKEN, _WRONGLY_DROPPED = 0.2, 0.1  # what is taken in the search is measured anew before it is believed
_CONFIDENCE = 0.9


@dataclass(frozen=True)
class Gain:
    """What a number of pairs say together.

    Attributes:
        ratio: the median of the pairs' ratios; below 1 is faster.
        low: lower end of the interval in which the median of all such pairs lies.
        high: its upper end.
        confidence: of that interval, at least 0.9; lower where there are less than 5 pairs.
        pairs: their number.
    """

    ratio: float
    low: float
    high: float
    confidence: float
    pairs: int

    @property
    def is_faster(self) -> bool:
        """Whether the whole interval lies below 1."""
        return self.high < 1 and self.confidence >= _CONFIDENCE


def verdict(ratios: Sequence[float]) -> bool | None:
    """Whether to take what was measured so far: True, False, or None, where another pair is needed.

    Wald's sequential probability ratio test (A. Wald, Sequential tests of statistical hypotheses, 1945) on the number
    of pairs with a ratio below `WIN`: of 9 in 10 of them, against a half. The first three decide for it, or six of
    seven; two others among the first three decide against it.
    """
    wins = sum(ratio < WIN for ratio in ratios)
    evidence = wins * math.log(_FASTER / 0.5) + (len(ratios) - wins) * math.log((1 - _FASTER) / 0.5)
    if evidence >= math.log((1 - _WRONGLY_DROPPED) / _WRONGLY_TAKEN):
        return True
    return False if evidence <= math.log(_WRONGLY_DROPPED / (1 - _WRONGLY_TAKEN)) else None


def gain(ratios: Sequence[float]) -> Gain:
    """The median ratio and an interval for it, from the ratios' order alone.

    The k-th smallest and k-th largest of n enclose the median of what they were drawn from, unless fewer than k of
    them lie on one side of it: with a probability of 1 − 2·P(B ≤ k − 1), B binomial of n and 1/2. The largest such k
    is taken. Source: H. A. David, H. N. Nagaraja, Order Statistics, 7.1.

    Args:
        ratios: at least one, decided on beforehand how many.
    """
    ordered = sorted(ratios)
    n = len(ordered)
    k = max((k for k in range(1, n // 2 + 1) if coverage(n, k) >= _CONFIDENCE), default=1)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Gain(middle, ordered[k - 1], ordered[n - k], coverage(n, k), n)


def is_hopeless(ratios: Sequence[float], pairs: int) -> bool:
    """Whether `gain` can't come to be faster any more, whatever the rest of so many pairs are."""
    return not gain([*ratios, *[0.0] * (pairs - len(ratios))]).is_faster


def coverage(n: int, k: int) -> float:
    """The probability that the k-th smallest and the k-th largest of n values enclose their distribution's median."""
    return max(0.0, 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n)

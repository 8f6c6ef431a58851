"""Random numbers for preparing and augmenting samples, that depend on sample and epoch, not on rank.

Whichever worker prepares a sample, in whichever batch, process or thread, before or after a resume:
it draws the same numbers. So N workers see what one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random stream of one sample in one epoch.

    Streams of different samples, epochs and seeds do not overlap: they are disjoint ranges of the
    counter of Philox (Salmon et al. 2011, doi:10.1145/2063384.2063405) under different keys.

    Args:
        seed: the run's, 0 … 2⁶⁴ − 1.
        epoch: from 0.
        index: the sample's, from 0.
    """
    return np.random.Generator(_philox(seed, epoch, index, 0))


def sample_seeds(seed: int, epoch: int, indices: Iterable[int]) -> np.ndarray:
    """A seed for each sample, for generators that are not numpy's: uint64, shape (n,)."""
    return np.array([_philox(seed, epoch, index, 1).random_raw() for index in indices], np.uint64)


def _philox(seed: int, epoch: int, index: int, use: int) -> np.random.Philox:
    # Arrays, as lists take twice as long.
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, index, use, 0], np.uint64))

"""Which samples are this rank's, in every global batch.

A global batch, not a shard, is the unit: the order of an epoch's samples depends on seed and epoch
alone, each global batch is cut into one part a rank, and weights make the mean over ranks of their
weighted mean losses the exact mean over the global batch. So N workers compute what one computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from toolkit.errors import UsageError


@dataclass(frozen=True)
class Part:
    """One rank's samples of one pass.

    Attributes:
        indices: int64, shape (n,), n ≥ 1. A rank that has no sample in this pass gets one sample
            of weight 0, so that it takes part in every collective operation.
        weight: what to multiply the mean loss over `indices` with. 1.0 where all parts are equal.
    """

    indices: np.ndarray
    weight: float


@dataclass(frozen=True)
class Sharding:
    """Cuts `samples` samples into global batches, and those into parts.

    Attributes:
        samples: number of samples in the data, ≥ 1.
        global_batch_size: samples that all ranks together take for one step, ≥ 1; the last batch
            of an epoch holds what is left.
        size: number of ranks.
        seed: 0 … 2³² − 1; decides, with the epoch's number, the order of the samples.
        accumulation_steps: passes that make one step; each global batch is cut into
            `size · accumulation_steps` parts.
    """

    samples: int
    global_batch_size: int
    size: int
    seed: int = 0
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("samples", "global_batch_size", "size", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}: give at least 1.")

    @property
    def steps_per_epoch(self) -> int:
        """Steps that every rank takes in an epoch."""
        return -(-self.samples // self.global_batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's samples in the order in which they are used: int64, shape (samples,)."""
        # RandomState, because numpy promises its stream for good: a run may be resumed under another numpy.
        return np.random.RandomState([self.seed, epoch]).permutation(self.samples)

    def global_batch(self, order: np.ndarray, step: int) -> np.ndarray:
        """The samples of an epoch's step, for all ranks together."""
        return order[step * self.global_batch_size : (step + 1) * self.global_batch_size]

    def part(self, batch: np.ndarray, rank: int, accumulation_pass: int = 0) -> Part:
        """What `rank` takes of a global batch in one of its passes.

        Over a step's parts, Σ weight·mean / (size · accumulation_steps) is the mean over the batch.
        """
        parts = self.size * self.accumulation_steps
        number = accumulation_pass * self.size + rank
        indices = batch[number * len(batch) // parts : (number + 1) * len(batch) // parts]
        if len(indices) == 0:
            return Part(batch[:1], 0.0)
        return Part(indices, len(indices) * parts / len(batch))

    def parts(self, epoch: int, rank: int, first_step: int = 0) -> Iterator[Part]:
        """The rank's parts of an epoch, from a step on: `accumulation_steps` of them for each step."""
        order = self.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            batch = self.global_batch(order, step)
            for accumulation_pass in range(self.accumulation_steps):
                yield self.part(batch, rank, accumulation_pass)


def block(samples: int, rank: int, size: int) -> slice:
    """Rank's contiguous share of `samples` samples; shares differ by one at most and may be empty."""
    return slice(rank * samples // size, (rank + 1) * samples // size)

"""Which samples are this rank's, in every global batch.

A global batch, not a shard, is the unit: which samples it holds depends on seed and epoch alone, each
is cut into one part a rank, and weights make the mean over ranks of their weighted mean losses the
exact mean over the global batch. So N workers compute what one computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from toolkit.errors import UsageError

KINDS = ("random", "sequential")
_FOLDS = 1  # tells the permutation behind k-fold from those of epochs


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
        global_batch_size: the most samples that all ranks together take for one step, ≥ 1.
        size: number of ranks.
        seed: 0 … 2³² − 1; decides, with the epoch's number, the order of the samples.
        accumulation_steps: passes that make one step; each global batch is cut into
            `size · accumulation_steps` parts.
        kind: "random": each epoch has a new permutation, its last batch holds what is left over.
            "sequential": a rank only ever takes samples of its own contiguous block, `block(samples,
            rank, size)`, for data that lies on its host. With s steps an epoch, step i takes the
            samples i, i + s, i + 2s … on whichever rank they lie, in every epoch the same, so that
            here too the batches do not depend on the number of ranks; their sizes differ by one at most.
    """

    samples: int
    global_batch_size: int
    size: int
    seed: int = 0
    accumulation_steps: int = 1
    kind: str = "random"

    def __post_init__(self) -> None:
        for name in ("samples", "global_batch_size", "size", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}: give at least 1.")
        if self.kind not in KINDS:
            raise UsageError(f"the kind of sharding is {self.kind!r}: give one of {', '.join(KINDS)}.")

    @property
    def steps_per_epoch(self) -> int:
        """Steps that every rank takes in an epoch."""
        return -(-self.samples // self.global_batch_size)

    def global_batches(self, epoch: int, first_step: int = 0) -> Iterator[np.ndarray]:
        """The samples of each step of an epoch, for all ranks together: int64, shape (n,), n ≥ 1."""
        steps = range(first_step, self.steps_per_epoch)
        if self.kind == "sequential":
            for step in steps:
                yield np.arange(step, self.samples, self.steps_per_epoch)
            return
        # RandomState, because numpy promises its stream for good: a run may be resumed under another numpy.
        order = np.random.RandomState([self.seed, epoch]).permutation(self.samples)
        for step in steps:
            yield order[step * self.global_batch_size : (step + 1) * self.global_batch_size]

    def part(self, batch: np.ndarray, rank: int, accumulation_pass: int = 0) -> Part:
        """What `rank` takes of a global batch in one of its passes.

        Over a step's parts, Σ weight·mean / (size · accumulation_steps) is the mean over the batch.
        """
        passes = self.accumulation_steps
        if self.kind == "sequential":
            own = block(self.samples, rank, self.size)
            mine = batch[np.searchsorted(batch, own.start) : np.searchsorted(batch, own.stop)]
            indices = mine[block(len(mine), accumulation_pass, passes)]
            idle = np.array([min(own.start, self.samples - 1)])
        else:
            indices = batch[block(len(batch), accumulation_pass * self.size + rank, self.size * passes)]
            idle = batch[:1]
        if len(indices) == 0:
            return Part(idle, 0.0)
        return Part(indices, len(indices) * self.size * passes / len(batch))

    def parts(self, epoch: int, rank: int, first_step: int = 0) -> Iterator[Part]:
        """The rank's parts of an epoch, from a step on: `accumulation_steps` of them for each step."""
        for batch in self.global_batches(epoch, first_step):
            for accumulation_pass in range(self.accumulation_steps):
                yield self.part(batch, rank, accumulation_pass)


def block(samples: int, rank: int, size: int) -> slice:
    """Rank's contiguous share of `samples` samples; shares differ by one at most and may be empty."""
    return slice(rank * samples // size, (rank + 1) * samples // size)


def k_fold(samples: int, folds: int, fold: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The samples to train on and those held out, in fold `fold` of `folds`.

    Over all folds each sample is held out once; which fold holds it depends on the seed alone.

    Args:
        samples: number of samples, at least `folds`.
        folds: k ≥ 2.
        fold: 0 … folds − 1.
        seed: 0 … 2³² − 1.

    Returns:
        (train, held out): ascending int64 indices; the held-out parts' lengths differ by one at most.

    Raises:
        UsageError: an argument is out of range.
    """
    if not 2 <= folds <= samples:
        raise UsageError(f"{folds} folds of {samples} samples: give at least 2 folds and at most one a sample.")
    if not 0 <= fold < folds:
        raise UsageError(f"fold {fold} of {folds}: give 0 to {folds - 1}.")
    held_out = np.zeros(samples, bool)
    held_out[np.random.RandomState([seed, _FOLDS, folds]).permutation(samples)[block(samples, fold, folds)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)

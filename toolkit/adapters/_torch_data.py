"""A `torch.utils.data.DataLoader` over the passes of a run, with random numbers that do not depend on the rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from toolkit.errors import UsageError
from toolkit.random_streams import sample_seeds
from toolkit.run import Run
from toolkit.sharding import Part

# What the run decides, and `generator`, which would only shuffle: samples have random streams of their own.
_REFUSED = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "in_order", "generator")


class Loader:
    """This rank's batches of a map-style dataset: iterate it once in each of the run's epochs.

    Iterating gives `(batch, weight)` for each pass that this rank has left in the epoch: what
    `collate_fn` makes of the pass's samples, n ≥ 1 of them, and what to multiply their mean loss with,
    a float; see `toolkit.sharding`. `run.log` is called once for each.

    While a sample is read, torch's CPU generator, Python's `random` and numpy's global generator are
    seeded from run's seed, epoch and sample, so that random transforms draw the same numbers on
    whichever rank and worker process, with any `num_workers`. Generators of the dataset's own, and the
    accelerator's, are not. In this process all three are put back after each batch.

    Worker processes that are forked have worked beside Horovod's and MPI's threads, but for a dataset
    that calls either, or that takes locks which other threads hold. `multiprocessing_context="forkserver"`
    or "spawn" forks no thread's locks; the script then needs its `if __name__ == "__main__":`, the dataset
    must pickle, and a worker takes seconds to start, so give `persistent_workers=True`.

    Args:
        run: the run; its number of samples is the dataset's.
        dataset: has `len()`, and `dataset[index]` for an int index gives one sample.
        options: `DataLoader`'s: num_workers, collate_fn, pin_memory, prefetch_factor, persistent_workers,
            multiprocessing_context, timeout, worker_init_fn, pin_memory_device.

    Raises:
        UsageError: the dataset is not map-style or has another length than the run, or an option would
            decide which samples come when, or is none of `DataLoader`'s.
    """

    def __init__(self, run: Run, dataset: Any, **options: Any) -> None:
        self._run, self._loader = run, _data_loader(run, dataset, _Collate, options)

    def __len__(self) -> int:
        """Passes that are left in the epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        return self._run.follow(
            (Part(indices, weight), (batch, weight)) for indices, weight, batch in iter(self._loader)
        )


def torch_data(run: Run, dataset: Any, **options: Any) -> DataLoader:
    """This rank's passes for `fit` of Keras on torch, from where the run stands; build it for each call of `fit`.

    Random transforms draw as under `Loader`, and worker processes are as safe.

    Args:
        run: the entered run.
        dataset: see `Loader`; its samples are `(x, y)`.
        options: see `Loader`; `collate_fn` gives `(x, y)`.

    Returns:
        A `DataLoader` of `(x, y, sample_weight)`; the weight is float32 of shape (n,). Under Keras' default
        reduction of losses to the mean they make the averaged gradients the exact mean over each global batch.

    Raises:
        UsageError: see `Loader`.
    """
    return _data_loader(run, dataset, _CollateForFit, options)


def _data_loader(run: Run, dataset: Any, collate: type[_Collate], options: dict[str, Any]) -> DataLoader:
    _check(run, dataset, options)
    collate_fn: Any = collate(options.pop("collate_fn", None) or default_collate)
    try:
        return DataLoader(
            _Samples(dataset, run.options.seed),
            batch_sampler=_Passes(run),
            collate_fn=collate_fn,
            generator=torch.Generator(),  # else each epoch and each resume would draw from the global one
            **options,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"torch's DataLoader does not take these options: {error}") from None


class _Key(NamedTuple):
    """What a worker is asked for: it outlives epochs, so everything it needs to know travels with the index."""

    epoch: int
    sample: int
    weight: float


class _Read(NamedTuple):
    """The samples of one pass as they were read."""

    indices: np.ndarray
    weight: float
    samples: list[Any]


class _Passes:
    """Gives `DataLoader` the keys of each pass that is left in the epoch that the run is in by then."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __len__(self) -> int:
        return self._run.steps_left_in_epoch * self._run.sharding.accumulation_steps

    def __iter__(self) -> Iterator[list[_Key]]:
        epoch = self._run.epoch
        parts = self._run.parts_left_in_epoch()
        return ([_Key(epoch, index, part.weight) for index in part.indices.tolist()] for part in parts)


class _Samples(Dataset):
    """The user's dataset, read under each sample's own random stream."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __len__(self) -> int:  # Keras counts no batches without it
        return len(self._dataset)

    def __getitems__(self, keys: Sequence[_Key]) -> _Read:
        """One pass's samples; torch's fetcher calls it with a whole batch, so that states are kept once for it."""
        indices = np.array([key.sample for key in keys], np.int64)
        seeds = sample_seeds(self._seed, keys[0].epoch, indices).tolist()
        before = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
        try:
            samples = [self._read(key.sample, seed) for key, seed in zip(keys, seeds, strict=True)]
        finally:
            torch.default_generator.set_state(before[0])
            np.random.set_state(before[1])
            random.setstate(before[2])
        return _Read(indices, keys[0].weight, samples)

    def _read(self, index: int, seed: int) -> Any:
        # Three Mersenne twisters: seeded alike they would draw alike, hence in three ways. And
        # torch.manual_seed would seed every accelerator too, at 80 times the time.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed([seed >> 32, seed & 0xFFFFFFFF])
        return self._dataset[index]


class _Collate:
    """The user's `collate_fn`, past which the indices and the weight are handed on."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, read: _Read) -> tuple[Any, Any, Any]:
        return read.indices, read.weight, self._collate(read.samples)


class _CollateForFit(_Collate):
    """The user's `collate_fn`, with the weights that Keras takes."""

    def __call__(self, read: _Read) -> tuple[Any, Any, Any]:
        x, y = self._collate(read.samples)
        return x, y, torch.full((len(read.indices),), read.weight)


def _check(run: Run, dataset: Any, options: dict[str, Any]) -> None:
    """Raise `UsageError` for what would break the run's sharding."""
    refused = [name for name in _REFUSED if name in options]
    if refused:
        raise UsageError(
            f"the loader was given {', '.join(refused)}: the run decides which samples come when "
            "(--global-batch-size, --sharding, --seed), so leave it out."
        )
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise UsageError(
            f"the dataset {kind} can only be iterated, so no sample of it can be asked for: "
            "give a map-style one, with len(dataset) and dataset[index]."
        )
    if len(dataset) != run.sharding.samples:
        raise UsageError(
            f"the dataset {kind} has {len(dataset)} samples and the run {run.sharding.samples}: "
            "give Run(…) the dataset's len()."
        )

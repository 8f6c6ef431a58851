"""A `tf.data.Dataset` over the passes of a run, whose samples bring seeds that do not depend on the rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from toolkit.errors import UsageError
from toolkit.random_streams import sample_seeds
from toolkit.run import Run
from toolkit.sharding import Part

Load = Callable[[tf.Tensor, tf.Tensor], tuple[Any, Any]]


def tf_data(run: Run, load: Load, *, batched: bool = False, parallel: int = tf.data.AUTOTUNE) -> tf.data.Dataset:
    """This rank's passes for Keras' `fit`, from where the run stands; build it anew for each call of `fit`.

    Each iteration takes up the epoch that the run is in, and reads ahead in the background.

    Args:
        run: the entered run.
        load: the user's function, in TensorFlow operations, from a sample's index, int64 of shape (), and
            its seed, int32 of shape (2,), to `(x, y)` of that sample; each may be a nest of tensors. The
            seed is for `tf.random.stateless_…` and `tf.image.stateless_random_…`: it depends on the
            run's seed, the epoch and the sample alone.
        batched: `load` takes a whole pass instead, indices of shape (n,) and seeds of shape (n, 2), and
            gives x and y of shape (n, …), n ≥ 1; such as `tf.gather` of arrays does.
        parallel: how many calls of `load` run at the same time; `tf.data.AUTOTUNE` decides by itself.

    Returns:
        `(x, y, sample_weight)` for each pass, in the run's order: shape (n, …) each, the weight float32 of
        shape (n,). Under Keras' default reduction of losses to the mean they make the averaged gradients
        the exact mean over each global batch. Its cardinality is the number of passes left in the epoch.

    Raises:
        UsageError: `load` does not give a tuple `(x, y)`.
    """
    left = run.steps_left_in_epoch * run.sharding.accumulation_steps
    dataset = _passes(run, load, batched, parallel)
    dataset = dataset.map(lambda indices, x, y, weight: (x, y, tf.fill(tf.shape(indices), weight)))
    return dataset.apply(tf.data.experimental.assert_cardinality(left)).prefetch(tf.data.AUTOTUNE)


class Loader:
    """This rank's batches for a loop of one's own: iterate it once in each of the run's epochs.

    Iterating gives `((x, y), weight)` for each pass that this rank has left in the epoch; the weight,
    float32 of shape (), is what to multiply the mean loss over the pass with; see `toolkit.sharding`.
    `run.log` is called once for each.

    Args:
        run: the run.
        load: see `tf_data`.
        batched: see `tf_data`.
        parallel: see `tf_data`.

    Raises:
        UsageError: `load` does not give a tuple `(x, y)`.
    """

    def __init__(self, run: Run, load: Load, *, batched: bool = False, parallel: int = tf.data.AUTOTUNE) -> None:
        self._run = run
        self._dataset = _passes(run, load, batched, parallel).prefetch(tf.data.AUTOTUNE)

    def __len__(self) -> int:
        """Passes that are left in the epoch."""
        return self._run.steps_left_in_epoch * self._run.sharding.accumulation_steps

    def __iter__(self) -> Iterator[tuple[tuple[Any, Any], tf.Tensor]]:
        return self._run.follow(
            (Part(indices.numpy(), float(weight)), ((x, y), weight)) for indices, x, y, weight in self._dataset
        )


def _passes(run: Run, load: Load, batched: bool, parallel: int) -> tf.data.Dataset:
    """`(indices, x, y, weight)` of each pass that is left in the epoch that the run is in by then."""
    several = (None,) if batched else ()
    signature = (tf.TensorSpec(several, tf.int64), tf.TensorSpec((*several, 2), tf.int32))
    _check_load(load, signature)

    def passes() -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        epoch = run.epoch
        for part in run.parts_left_in_epoch():
            seeds = sample_seeds(run.options.seed, epoch, part.indices)
            yield part.indices, seeds.view(np.int32).reshape(-1, 2), part.weight

    def read(indices: tf.Tensor, seeds: tf.Tensor, weight: tf.Tensor) -> tf.data.Dataset:
        samples = tf.data.Dataset.from_tensor_slices((indices, seeds))
        samples = samples.map(load, num_parallel_calls=parallel, deterministic=True)
        return samples.batch(tf.size(indices, tf.int64)).map(lambda x, y: (indices, x, y, weight))

    def read_batched(indices: tf.Tensor, seeds: tf.Tensor, weight: tf.Tensor) -> tuple[Any, ...]:
        return indices, *load(indices, seeds), weight

    specs = (tf.TensorSpec((None,), tf.int64), tf.TensorSpec((None, 2), tf.int32), tf.TensorSpec((), tf.float32))
    dataset = tf.data.Dataset.from_generator(passes, output_signature=specs)
    if batched:
        return dataset.map(read_batched, num_parallel_calls=parallel, deterministic=True)
    return dataset.flat_map(read)


def _check_load(load: Load, signature: tuple[tf.TensorSpec, tf.TensorSpec]) -> None:
    """Trace `load` alone, to tell in one line what it gives where that is no pair."""
    found = tf.function(load).get_concrete_function(*signature).structured_outputs
    if not (isinstance(found, tuple) and len(found) == 2):
        raise UsageError(f"load(index, seed) gives {found}: have it return a tuple (x, y).")

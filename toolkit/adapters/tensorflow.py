"""The TensorFlow adapter: `toolkit.adapters.Adapter` for `tf.GradientTape` loops with Keras 3 optimizers.

The loop stays as it is, in or outside `tf.function`: `optimizer.apply_gradients` and
`optimizer.apply` average over all ranks first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from toolkit.adapters import (
    _job,
    _keras_batch_norm,
    _keras_optimizer,
    _keras_state,
    _reduction,
    _shared,
    _tensorflow_ops,
)
from toolkit.adapters._tensorflow_data import Loader as Loader
from toolkit.adapters._tensorflow_data import tf_data as tf_data
from toolkit.errors import UsageError
from toolkit.world import World


def start(
    *,
    seed: int = 0,
    tune: bool = True,
    verbose: bool = False,
    deterministic: bool = False,
    groups: int = 1,
    stall_timeout: float = 300.0,
    device: str = "auto",
    share_gpus: bool = False,
) -> World:
    """See `toolkit.adapters.Adapter.start`; comes before TensorFlow's first operation, which fixes its threads."""
    _job.end_job_on_exception(World())
    if keras.backend.backend() != "tensorflow":
        raise UsageError(
            f"TensorFlow's optimizers are Keras', which runs on {keras.backend.backend()} here: "
            "set KERAS_BACKEND=tensorflow."
        )
    here, choices = _job.start_horovod(
        hvd,
        _tensorflow_ops,
        tune=tune,
        verbose=verbose,
        deterministic=deterministic,
        groups=groups,
        stall_timeout=stall_timeout,
        device=device,
    )
    here = _job.choose_device(hvd, here, device, share_gpus, _tensorflow_ops)
    if choices.threads:
        _tensorflow_ops.set_threads(choices.threads)
    if deterministic:
        _tensorflow_ops.be_deterministic()
    keras.utils.set_random_seed(seed)
    _shared.seed_python_and_numpy(seed)
    _job.check_devices(hvd, here, device, share_gpus, gather)
    _job.begin_watch(hvd, here, gather, stall_timeout)
    return here


def stop() -> None:
    """See `toolkit.adapters.Adapter.stop`."""
    _job.stop_horovod(hvd, gather)


def distribute(
    optimizer: Any,
    model: Any,
    *,
    accumulation_steps: int = 1,
    clip_norm: float | None = None,
    compression: str = "none",
    reducer: str = "auto",
) -> Any:
    """See `toolkit.adapters.Adapter.distribute`.

    `model` is a `keras.Model` or a `tf.Module`. Keras' own options (clipping, weight decay, EMA,
    accumulation, loss scaling) act on the averaged gradients; a `LossScaleOptimizer` is distributed
    as a whole, so that an overflow on one rank makes all of them skip the step.
    """
    _job.require_started(hvd)
    _shared.check_distribute_options(accumulation_steps, clip_norm, compression, reducer)
    if not isinstance(model, tf.Module | keras.Layer):
        raise UsageError(f"the model is a {type(model).__name__}: give the keras.Model or tf.Module that is trained.")
    average = _tensorflow_ops.GradientAverager(_job.collective_name(), compression, reducer)
    return _keras_optimizer.distribute(optimizer, model, average, accumulation_steps, clip_norm)


def synchronize_batch_norm(model: Any) -> Any:
    """See `toolkit.adapters.Adapter.synchronize_batch_norm`; for `keras.layers.BatchNormalization`, with masks too.

    `model` is a `keras.Model`, or a `tf.Module` that holds Keras layers.
    """
    _job.require_started(hvd)
    if isinstance(model, keras.Layer):
        outermost = [model]
    elif isinstance(model, tf.Module):
        outermost = model._flatten(predicate=lambda value: isinstance(value, keras.Layer))
    else:
        raise UsageError(f"the model is a {type(model).__name__}: give the keras.Model or tf.Module that is trained.")
    layers = [layer for outer in outermost for layer in outer._flatten_layers()]
    _keras_batch_norm.synchronize(model, layers, _tensorflow_ops.batch_norm)
    return model


def broadcast_state(model: Any, optimizer: Any = None) -> None:
    """See `toolkit.adapters.Adapter.broadcast_state`."""
    _job.require_started(hvd)
    _keras_state.broadcast_state(model, optimizer, _tensorflow_ops.broadcast, hvd.rank() == _job.root_rank())


def average(values: Mapping[str, float | np.ndarray], weight: float = 1.0) -> dict[str, float | np.ndarray]:
    """See `toolkit.adapters.Adapter.average`; called eagerly, not in a `tf.function`."""
    _job.require_started(hvd)
    return _shared.weighted_average(values, weight, _tensorflow_ops.all_reduce_sum)


def gather(value: Any, *, all_groups: bool = False) -> list[Any]:
    """See `toolkit.adapters.Adapter.gather`; called eagerly, not in a `tf.function`."""
    _job.require_started(hvd)
    return _tensorflow_ops.gather(value, _job.process_set(all_groups))


def exchange_flag(flag: bool | None) -> tuple[bool, str | None]:
    """See `toolkit.adapters.Adapter.exchange_flag`; a `LossScaleOptimizer` sees to gradients that are not finite."""
    return _tensorflow_ops.exchange_flag(flag)


def on_device(*arrays: np.ndarray) -> tuple[Any, ...]:
    """See `toolkit.adapters.Adapter.on_device`."""
    return _tensorflow_ops.on_device(arrays)


def export_state(model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
    """See `toolkit.adapters.Adapter.export_state`; names as in the keras adapter."""
    return _keras_state.export_state(model, optimizer)


def import_state(model: Any, optimizer: Any, state: Mapping[str, np.ndarray]) -> None:
    """See `toolkit.adapters.Adapter.import_state`; an optimizer without slots yet is built."""
    _keras_state.import_state(model, optimizer, state)


def digest(model: Any, optimizer: Any = None) -> dict[str, str]:
    """See `toolkit.adapters.Adapter.digest`."""
    return _keras_state.digest(model, optimizer)


def seed_local(model: Any, seed: int, rank: int) -> None:
    """See `toolkit.adapters.Adapter.seed_local`."""
    _tensorflow_ops.seed_random(_shared.framework_seed(seed, rank))
    _keras_state.seed_random_layers(model, seed, rank)  # may make Keras' generator, from a draw of Python's
    _shared.seed_python_and_numpy(seed)


def export_local(model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
    """See `toolkit.adapters.Adapter.export_local`.

    Keras' random layers and `tf.random.Generator.from_…` are among it; what TensorFlow's operations with a
    hidden state draw (`tf.random.normal`, `tf.image.random_flip…`) is not: use the `stateless_` ones.
    """
    kept = optimizer._average.state() if _keras_optimizer.is_distributed(optimizer) else {}
    return {**_keras_state.export_local(model), **_tensorflow_ops.export_random(), **kept}


def import_local(model: Any, state: Mapping[str, np.ndarray], optimizer: Any = None) -> None:
    """See `toolkit.adapters.Adapter.import_local`."""
    _shared.check_state_fits(_reduction.without_compression(state), export_local(model))
    _keras_state.import_local(model, state)
    _tensorflow_ops.import_random(state)
    if _keras_optimizer.is_distributed(optimizer):
        optimizer._average.load_state(state)


def usage() -> dict[str, float]:
    """See `toolkit.adapters.Adapter.usage`."""
    return _job.usage(_tensorflow_ops.peak_memory)


def describe(model: Any) -> dict[str, Any]:
    """See `toolkit.adapters.Adapter.describe`."""
    return {"framework": "tensorflow", **_keras_state.describe(model)}

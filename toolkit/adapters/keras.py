"""The Keras adapter: `toolkit.adapters.Adapter` for Keras 3 models, on KERAS_BACKEND=tensorflow and torch.

`fit` stays as it is: `optimizer = distribute(optimizer, model)` before `compile`, and the callbacks
`BroadcastState`, `MetricAverage` and `LearningRateWarmup` where they are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from toolkit import schedule
from toolkit.adapters import _job, _keras_batch_norm, _keras_optimizer, _keras_state, _reduction, _shared
from toolkit.adapters._keras_run import Batches as Batches
from toolkit.adapters._keras_run import RunCallback as RunCallback
from toolkit.errors import UsageError
from toolkit.world import World

BACKEND = keras.backend.backend()

if BACKEND == "tensorflow":
    import horovod.tensorflow as hvd

    from toolkit.adapters import _tensorflow_ops as _ops
    from toolkit.adapters._tensorflow_data import tf_data as tf_data
elif BACKEND == "torch":
    import horovod.torch as hvd

    from toolkit.adapters import _keras_torch_ops as _ops  # type: ignore[no-redef]
    from toolkit.adapters._torch_data import torch_data as torch_data


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
    """See `toolkit.adapters.Adapter.start`; comes before the backend's first operation, which fixes its threads."""
    _job.end_job_on_exception(World())
    _check_backend()
    here, choices = _job.start_horovod(
        hvd,
        _ops,
        tune=tune,
        verbose=verbose,
        deterministic=deterministic,
        groups=groups,
        stall_timeout=stall_timeout,
        device=device,
    )
    here = _job.choose_device(hvd, here, device, share_gpus, _ops)
    if choices.threads:
        _ops.set_threads(choices.threads)
    if deterministic:
        _ops.be_deterministic()
    _keras_state.seed(seed)
    _ops.seed_random(seed)
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

    Works with `fit`, with one's own `train_step`, and with `optimizer.apply` and `apply_gradients`.
    Keras' own options (clipping, weight decay, EMA, accumulation, loss scaling) act on the averaged
    gradients. For a mixed_float16 model give a `LossScaleOptimizer`: it is distributed as a whole,
    so that an overflow on one rank makes all of them skip the step.

    Raises:
        UsageError: besides what `Adapter.distribute` lists, the model is compiled with
            `jit_compile=True` on TensorFlow. Compiled so later, its first train step raises it.
    """
    _require_started()
    _shared.check_distribute_options(accumulation_steps, clip_norm, compression, reducer)
    if not isinstance(model, keras.Layer):
        raise UsageError(f"the model is a {type(model).__name__}: give the keras.Model that the optimizer trains.")
    _ops.check_place(model)
    averager = _ops.GradientAverager(_job.collective_name(), compression, reducer)
    return _keras_optimizer.distribute(optimizer, model, averager, accumulation_steps, clip_norm)


def synchronize_batch_norm(model: Any) -> Any:
    """See `toolkit.adapters.Adapter.synchronize_batch_norm`; for `keras.layers.BatchNormalization`, with masks too.

    On torch the gradients of its operations can't be differentiated again.
    """
    _require_started()
    if not isinstance(model, keras.Layer):
        raise UsageError(f"the model is a {type(model).__name__}: give the keras.Model that is trained.")
    _keras_batch_norm.synchronize(model, model._flatten_layers(), _ops.batch_norm)
    return model


def broadcast_state(model: Any, optimizer: Any = None) -> None:
    """See `toolkit.adapters.Adapter.broadcast_state`."""
    _require_started()
    _keras_state.broadcast_state(model, optimizer, _ops.broadcast, hvd.rank() == _job.root_rank())


def average(values: Mapping[str, float | np.ndarray], weight: float = 1.0) -> dict[str, float | np.ndarray]:
    """See `toolkit.adapters.Adapter.average`."""
    _require_started()
    return _shared.weighted_average(values, weight, _ops.all_reduce_sum)


def gather(value: Any, *, all_groups: bool = False) -> list[Any]:
    """See `toolkit.adapters.Adapter.gather`."""
    _require_started()
    return _ops.gather(value, _job.process_set(all_groups))


def exchange_flag(flag: bool | None) -> tuple[bool, str | None]:
    """See `toolkit.adapters.Adapter.exchange_flag`; a `LossScaleOptimizer` sees to gradients that are not finite."""
    return _ops.exchange_flag(flag)


def on_device(*arrays: np.ndarray) -> tuple[Any, ...]:
    """See `toolkit.adapters.Adapter.on_device`."""
    return _ops.on_device(arrays)


def export_state(model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
    """See `toolkit.adapters.Adapter.export_state`; the same names on both backends."""
    return _keras_state.export_state(model, optimizer)


def import_state(model: Any, optimizer: Any, state: Mapping[str, np.ndarray]) -> None:
    """See `toolkit.adapters.Adapter.import_state`; an optimizer without slots yet is built."""
    _keras_state.import_state(model, optimizer, state)


def digest(model: Any, optimizer: Any = None) -> dict[str, str]:
    """See `toolkit.adapters.Adapter.digest`."""
    return _keras_state.digest(model, optimizer)


def seed_local(model: Any, seed: int, rank: int) -> None:
    """See `toolkit.adapters.Adapter.seed_local`."""
    _ops.seed_random(_shared.framework_seed(seed, rank))
    _keras_state.seed_random_layers(model, seed, rank)  # may make Keras' generator, from a draw of Python's
    _shared.seed_python_and_numpy(seed)


def export_local(model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
    """See `toolkit.adapters.Adapter.export_local`.

    Keras' random layers and `tf.random.Generator.from_…` are among it; what TensorFlow's operations with a
    hidden state draw (`tf.random.normal`, `tf.image.random_flip…`) is not: use the `stateless_` ones.
    """
    kept = optimizer._average.state() if _keras_optimizer.is_distributed(optimizer) else {}
    return {**_keras_state.export_local(model), **_ops.export_random(), **kept}


def import_local(model: Any, state: Mapping[str, np.ndarray], optimizer: Any = None) -> None:
    """See `toolkit.adapters.Adapter.import_local`."""
    _shared.check_local_fits(_reduction.without_compression(state), export_local(model))
    _keras_state.import_local(model, state)
    _ops.import_random(state)
    if _keras_optimizer.is_distributed(optimizer):
        optimizer._average.load_state(state)


def usage() -> dict[str, float]:
    """See `toolkit.adapters.Adapter.usage`."""
    return _job.usage(_ops.peak_memory)


def describe(model: Any) -> dict[str, Any]:
    """See `toolkit.adapters.Adapter.describe`."""
    return {"framework": "keras", **_keras_state.describe(model)}


class BroadcastState(keras.callbacks.Callback):
    """Give every rank rank 0's model and optimizer state before the first batch of each `fit`.

    Raises:
        UsageError: from `fit`, where the model has no input shape yet, so no variables, where its
            optimizer is not distributed, or where its train step would be compiled with XLA.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast, by Keras' call at the start of `fit`."""
        _keras_optimizer.require_distributed(self.model)
        if BACKEND == "tensorflow" and self.model.jit_compile:
            raise UsageError("the model is compiled with jit_compile=True, which can't hold Horovod: use False.")
        broadcast_state(self.model, self.model.optimizer)


class MetricAverage(keras.callbacks.Callback):
    """Make the epoch's logs the metrics over all ranks' samples; place it before callbacks that read them.

    The metrics' own state (sums and counts, confusion matrices) is summed over the ranks, so ranks
    may hold different numbers of samples, and the result is what one process reports that saw all
    samples with the same sample weights: `metrics` and `loss` count every sample as one,
    `weighted_metrics` by its weight. Other numbers in the logs become their plain mean. What
    `evaluate` returns outside of `fit` stays this rank's.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuse an optimizer that is not distributed."""
        _keras_optimizer.require_distributed(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Forget the last epoch's metrics."""
        self._training: dict[str, Any] | None = None

    def on_test_begin(self, logs: Any = None) -> None:
        """Take the training metrics before Keras resets them for validation."""
        self._training = self._over_all_ranks()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace the values in `logs`, which the callbacks after this one receive."""
        if logs is None:
            return
        last = self._over_all_ranks()
        values = last if self._training is None else {**self._training, **{f"val_{k}": v for k, v in last.items()}}
        others = {k: v for k, v in logs.items() if k not in values and np.ndim(v) == 0}
        logs.update(average(others))
        logs.update({k: v for k, v in values.items() if k in logs})

    def _over_all_ranks(self) -> dict[str, Any]:
        variables = [v for metric in self.model.metrics for v in metric.variables]
        for v in variables:
            if v.aggregation != "sum":
                raise UsageError(
                    f"the metric variable {v.path} has aggregation={v.aggregation!r}: only sums add up over ranks."
                )
        arrays = [np.asarray(keras.ops.convert_to_numpy(v), np.float64) for v in variables]
        total = _ops.all_reduce_sum(np.concatenate([np.zeros(0), *(a.ravel() for a in arrays)]))
        parts = np.split(total, np.cumsum([a.size for a in arrays]))
        for v, a, part in zip(variables, arrays, parts, strict=False):
            v.assign(part.reshape(a.shape))
        return {k: float(v) if np.ndim(v) == 0 else v for k, v in self.model.get_metrics_result().items()}


class LearningRateWarmup(keras.callbacks.Callback):
    """Raise the learning rate batch by batch to its full value, as `toolkit.schedule.warmup` does.

    Source: Goyal et al. 2017, arXiv:1706.02677, section 2.2. After the warm-up the rate is left to
    other callbacks; a resumed run goes on from the optimizer's own count of steps.

    Args:
        learning_rate: the full rate, scaled already, per step.
        warmup_steps: length of the warm-up in optimizer steps; 0 means none.
        start_factor: the factor at step 0, such as 1 / size.
    """

    def __init__(self, learning_rate: float, warmup_steps: int, start_factor: float):
        super().__init__()
        self._options = (learning_rate, warmup_steps, start_factor)

    def on_train_begin(self, logs: Any = None) -> None:
        """Find out where the run stands."""
        self._done = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set this batch's rate."""
        if self._done:
            return
        learning_rate, warmup_steps, start_factor = self._options
        step = int(self.model.optimizer.iterations)
        self._done = step >= warmup_steps
        if step <= warmup_steps:
            try:
                self.model.optimizer.learning_rate = learning_rate * schedule.warmup(step, warmup_steps, start_factor)
            except (TypeError, AttributeError):
                raise UsageError(
                    "LearningRateWarmup sets the learning rate, and this optimizer's can't be set: give the "
                    "optimizer a number, or put the warm-up into its LearningRateSchedule."
                ) from None


def _check_backend() -> None:
    if BACKEND not in ("tensorflow", "torch"):
        raise UsageError(
            f"Keras runs on the {BACKEND} backend, which Horovod does not know: set KERAS_BACKEND=tensorflow or torch."
        )


def _require_started() -> None:
    _check_backend()
    _job.require_started(hvd)

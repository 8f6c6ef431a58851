"""Averaging of TensorFlow gradients over all ranks, for the tensorflow adapter and for Keras on TensorFlow."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from toolkit import watch
from toolkit.adapters import _job
from toolkit.errors import UsageError

# What a variable's gradient is on a rank; where ranks differ, the largest is what all of them send.
_MISSING, _SPARSE, _DENSE = 0, 1, 2


def set_threads(threads: int) -> None:
    """Give TensorFlow this many compute threads; must come before its first operation."""
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        # One thread for independent operations would let a Python data generator wait for itself.
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
    except RuntimeError:
        warnings.warn("TensorFlow ran an operation before start(): its thread counts stay as they are.", stacklevel=3)


def all_reduce_sum(vector: np.ndarray) -> np.ndarray:
    """The sum of a float64 vector over all ranks."""
    values, ranks = tf.constant(vector), _job.process_set()
    with watch.waiting("average()"):
        return hvd.allreduce(values, op=hvd.Sum, name="hvdkit.sum", process_set=ranks).numpy()


def gather(value: Any, process_set: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    with watch.waiting("gather()", all_groups=process_set is not _job.process_set()):
        return hvd.allgather_object(value, name="hvdkit.gather", process_set=process_set)


def be_deterministic() -> None:
    """Have every operation of TensorFlow give the same bits in every run."""
    tf.config.experimental.enable_op_determinism()
    tf.random.set_global_generator(tf.random.Generator.from_seed(0))  # which it makes by chance otherwise


def seed_random(seed: int) -> None:
    """Seed TensorFlow's global generators."""
    tf.random.set_seed(seed)
    tf.random.get_global_generator().reset_from_seed(seed)


def export_random() -> dict[str, np.ndarray]:
    """The state of TensorFlow's global generator; that of operations such as `tf.random.normal` can't be had."""
    return {"random/tensorflow": tf.random.get_global_generator().state.numpy()}


def import_random(state: Mapping[str, np.ndarray]) -> None:
    """Put back what `export_random` gave."""
    tf.random.get_global_generator().state.assign(state["random/tensorflow"])


class _Exchange:
    """What travels beside the gradients; see `exchange_flag`. Made by the first averager: it holds variables."""

    def __init__(self) -> None:
        self.flag = tf.Variable(0.0, trainable=False)
        self.heard = tf.Variable(0.0, trainable=False)  # above 0: a rank's flag was up, or a mean not finite
        self.broken = tf.Variable(_WHOLE, trainable=False)  # one of the two below, or the place of a name
        self.guarded = tf.Variable(False, trainable=False)
        self.names: list[str] = []
        self.told: bool | None = None  # what `flag` and `guarded` hold: an assignment takes as long as three readings


_WHOLE, _ELSEWHERE = -2, -1
_exchanges: list[_Exchange] = []  # one, once it is made


def _exchange() -> _Exchange:
    if not _exchanges:
        with tf.init_scope():
            _exchanges.append(_Exchange())
    return _exchanges[0]


def exchange_flag(flag: bool | None) -> tuple[bool, str | None]:
    """See `toolkit.adapters.Adapter.exchange_flag`."""
    exchange = _exchange()
    heard = float(exchange.heard) > 0  # the one thing that every step reads; in half the time of .numpy()
    place = int(exchange.broken) if heard else _WHOLE
    if flag is not exchange.told:
        exchange.told = flag
        exchange.flag.assign(float(flag or 0))
        exchange.guarded.assign(flag is not None)
    if heard:
        exchange.heard.assign(0.0)
        exchange.broken.assign(_WHOLE)
    return heard, None if place == _WHOLE else "" if place == _ELSEWHERE else exchange.names[place]


class GradientAverager:
    """Averages gradients over all ranks, in and outside `tf.function`.

    A gradient missing (None) on some ranks counts as zero there; one missing on every rank stays
    None. Eagerly, ranks agree before each call on which gradients there are; a traced function has
    them fixed, so that they agree once, when the first function with these variables is traced.
    """

    def __init__(self, name: str, compression: str):
        """`name` names the collective operations, alike on all ranks, and is used for nothing else."""
        self._name = name
        self._compression = compression
        self._agreed: dict[tuple[int, ...], tuple[list[int], list[Any]]] = {}
        self._places: dict[tuple[int, ...], tuple[int, list[Any]]] = {}  # of the variables' names among all

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """The mean of each gradient (dense tensor, `tf.IndexedSlices` or None) over all ranks."""
        kinds = self._kinds(gradients, variables)
        means: list[Any] = [None] * len(kinds)
        dense: dict[tf.DType, list[int]] = {}
        for i, kind in enumerate(kinds):
            if kind == _SPARSE:
                means[i] = self._average_sparse(gradients[i], variables[i], f"{self._name}.sparse{i}")
            elif kind == _DENSE:
                dense.setdefault(self._wire_dtype(variables[i]), []).append(i)
        exchange = _exchange()
        if not any(dtype.is_floating for dtype in dense):
            dense[tf.float32] = []
        carrier = next(dtype for dtype in dense if dtype.is_floating)
        for dtype, indices in dense.items():  # a group holds one dtype
            packed = [tf.cast(_to_dense(gradients[i], variables[i]), dtype) for i in indices]
            if dtype == carrier:
                packed.append(tf.cast(exchange.flag, dtype))
            name = f"{self._name}.{dtype.name}"
            with _waiting(name):
                reduced = hvd.grouped_allreduce(
                    packed, op=hvd.Average, name=name, ignore_name_scope=True, process_set=_job.process_set()
                )
            if dtype == carrier:
                exchange.heard.assign_add(tf.cast(reduced.pop(), tf.float32))
            for i, mean in zip(indices, reduced, strict=True):
                means[i] = tf.cast(mean, variables[i].dtype)
        return means

    def unless_broken(
        self, means: Sequence[Any], gradients: Sequence[Any], variables: Sequence[Any], apply: Callable[[], Any]
    ) -> None:
        """Call `apply`, or note that the step is left out because a mean is not finite."""
        exchange = _exchange()
        taken = _are_finite(means) | ~exchange.guarded
        key = tuple(id(v) for v in variables)
        if key not in self._places:
            self._places[key] = len(exchange.names), list(variables)  # held, so that ids stay theirs
            exchange.names += [getattr(v, "path", v.name) for v in variables]

        def leave_out() -> None:
            finite = tf.stack([_are_finite([g]) for g in gradients])
            first = self._places[key][0] + tf.argmin(tf.cast(finite, tf.int32), output_type=tf.int32)
            place = tf.where(tf.reduce_all(finite), _ELSEWHERE, first)
            exchange.broken.assign(tf.where(exchange.broken == _WHOLE, place, exchange.broken))
            exchange.heard.assign_add(1.0)

        if tf.executing_eagerly():
            apply() if taken else leave_out()
        else:
            tf.cond(taken, apply, leave_out)

    def _kinds(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[int]:
        local = [_MISSING if g is None else _SPARSE if isinstance(g, tf.IndexedSlices) else _DENSE for g in gradients]
        if tf.executing_eagerly():
            return self._agree(local)
        if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise UsageError(
                "jit_compile=True compiles the train step with XLA, which can't hold the gradients' averaging: "
                "use jit_compile=False."
            )
        key = tuple(id(v) for v in variables)
        if key not in self._agreed:
            with tf.init_scope():
                self._agreed[key] = self._agree(local), list(variables)  # held, so that ids stay theirs
        kinds = self._agreed[key][0]
        for kind, agreed, variable in zip(local, kinds, variables, strict=True):
            if kind > agreed:
                raise UsageError(
                    f"the gradient of {variable.name} is of another kind than when a function with these variables "
                    "was first traced: let every traced step use the same variables in the same way, or run eagerly."
                )
        return kinds

    def _agree(self, kinds: list[int]) -> list[int]:
        local, name = tf.constant(kinds, tf.int32), f"{self._name}.kinds"
        with watch.waiting(name):
            return hvd.allreduce(local, op=hvd.Max, name=name, process_set=_job.process_set()).numpy().tolist()

    def _wire_dtype(self, variable: Any) -> tf.DType:
        dtype = tf.as_dtype(variable.dtype)
        if self._compression == "fp16" and dtype.is_floating:
            return tf.float16
        return tf.float32 if dtype == tf.bfloat16 else dtype  # Horovod's TensorFlow part knows no bfloat16

    def _average_sparse(self, gradient: Any, variable: Any, name: str) -> tf.IndexedSlices:
        """The mean of row-sparse gradients: every rank's rows, those of the same index summed."""
        if gradient is None:
            gradient = tf.IndexedSlices(tf.zeros([0, *variable.shape[1:]], variable.dtype), tf.zeros([0], tf.int64))
        indices, values = _sum_duplicates(tf.cast(gradient.indices, tf.int64), gradient.values)
        wire = tf.float32 if values.dtype == tf.bfloat16 else values.dtype
        ranks = _job.process_set()
        with _waiting(name):
            indices = hvd.allgather(indices, f"{name}.indices", ignore_name_scope=True, process_set=ranks)
            values = hvd.allgather(tf.cast(values, wire), f"{name}.values", ignore_name_scope=True, process_set=ranks)
        # Optimizers need unique indices; and sums of duplicates inside them may depend on threads.
        indices, values = _sum_duplicates(indices, values / ranks.size())
        return tf.IndexedSlices(
            tf.cast(values, variable.dtype), indices, dense_shape=tf.constant(list(variable.shape), tf.int64)
        )


def _waiting(name: str) -> Any:
    """Tells the watch of an operation; while a function is traced none is done."""
    return watch.waiting(name) if tf.executing_eagerly() else contextlib.nullcontext()


def _are_finite(tensors: Sequence[Any]) -> Any:
    values = [t.values if isinstance(t, tf.IndexedSlices) else t for t in tensors if t is not None]
    values = [v for v in values if v.dtype.is_floating]
    if not values:
        return tf.constant(True)
    # A sum is finite only where every element is, and costs less than looking at each.
    sums = tf.stack([tf.reduce_sum(tf.cast(v, tf.float32)) for v in values])
    return tf.cond(
        tf.reduce_all(tf.math.is_finite(sums)),
        lambda: True,
        lambda: tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(v)) for v in values])),
    )


def _to_dense(gradient: Any, variable: Any) -> tf.Tensor:
    return tf.zeros(variable.shape, variable.dtype) if gradient is None else tf.convert_to_tensor(gradient)


def _sum_duplicates(indices: tf.Tensor, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    unique, positions = tf.unique(indices)
    return unique, tf.math.unsorted_segment_sum(values, positions, tf.size(unique))

"""Averaging of TensorFlow gradients over all ranks, for the tensorflow adapter and for Keras on TensorFlow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from toolkit import watch
from toolkit.adapters import _job, _reduction, _tensorflow_horovod
from toolkit.adapters._reduction import exchange
from toolkit.adapters._tensorflow_horovod import ELSEWHERE, HOST, WHOLE, HorovodWire, in_graph, to_dense
from toolkit.compression import Compressor
from toolkit.errors import UsageError

# What a variable's gradient is on a rank; where ranks differ, the largest is what all of them send.
_MISSING, _SPARSE, _DENSE = 0, 1, 2
_UNDECIDED = "undecided"
_ALIGNMENT = 64  # bytes
_LARGE = 2**16  # elements from which another way through memory takes longer than another array
_EXTRA = 2  # numbers that travel beside the gradients


class GradientAverager(_reduction.Averager):
    """Averages gradients over all ranks, in and outside `tf.function`.

    A gradient missing (None) on some ranks counts as zero there; one missing on every rank stays
    None. Eagerly, ranks agree before each call on which gradients there are; a traced function has
    them fixed, so that they agree once, when the first function with these variables is traced.
    """

    def __init__(self, name: str, compression: str, reducer: str):
        super().__init__(name, compression, reducer)
        self._wire: Any = _UNDECIDED  # a `toolkit.compression.Wire`, or None: Horovod adds up tensors
        self._broken = ""  # where the wire's latest mean is not finite: the first of this rank's variables
        self._taken: Any = None  # a tensor: whether it is, or nobody asks; None where Horovod added up
        self._agreed: dict[tuple[int, ...], tuple[list[int], list[Any]]] = {}
        self._places: dict[tuple[int, ...], tuple[int, list[Any]]] = {}  # of the variables' names among all

    @tf.autograph.experimental.do_not_convert  # which is no graph's, and AutoGraph would warn of MPI's functions
    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """The mean of each gradient (dense tensor, `tf.IndexedSlices` or None) over all ranks."""
        kinds = self._kinds(gradients, variables)
        if self._wire == _UNDECIDED:
            with tf.init_scope():
                self._wire = self._choose(variables, kinds)
        self._taken = None
        means: list[Any] = [None] * len(kinds)
        dense: dict[tf.DType, list[int]] = {}
        for i, kind in enumerate(kinds):
            if kind == _SPARSE:
                means[i] = _tensorflow_horovod.average_sparse(f"{self._name}.sparse{i}", gradients[i], variables[i])
            elif kind == _DENSE:
                dense.setdefault(self._wire_dtype(variables[i]), []).append(i)
        if self._wire is not None:
            self._through_wire(gradients, variables, dense, means)
            return means
        if _job.process_set().size() > 1:
            _tensorflow_horovod.average_dense(self._name, gradients, variables, dense, means)
            return means
        for i in itertools.chain(*dense.values()):
            means[i] = to_dense(gradients[i], variables[i])
        graph = in_graph()
        with tf.device(HOST):
            graph.heard.assign_add(graph.flag)
        return means

    def unless_broken(
        self, means: Sequence[Any], gradients: Sequence[Any], variables: Sequence[Any], apply: Callable[[], Any]
    ) -> None:
        """Call `apply`, or note that the step is left out because a mean is not finite."""
        if self._taken is not None:

            def note() -> None:
                tf.numpy_function(lambda: _reduction.leave_out(self._broken), [], [])

            _either(self._taken, apply, note)
            return
        graph = in_graph()
        taken = _are_finite(means) | ~graph.guarded
        key = tuple(id(v) for v in variables)
        if key not in self._places:
            self._places[key] = len(graph.names), list(variables)  # held, so that ids stay theirs
            graph.names += [getattr(v, "path", v.name) for v in variables]

        def leave_out() -> None:
            finite = tf.stack([_are_finite([g]) for g in gradients])
            first = self._places[key][0] + tf.argmin(tf.cast(finite, tf.int32), output_type=tf.int32)
            place = tf.where(tf.reduce_all(finite), ELSEWHERE, first)
            with tf.device(HOST):
                graph.broken.assign(tf.where(graph.broken == WHOLE, place, graph.broken))
                graph.heard.assign_add(1.0)

        _either(taken, apply, leave_out)

    def _choose(self, variables: Sequence[Any], kinds: Sequence[int]) -> Any:
        def by_horovod(numbers: np.ndarray) -> None:
            with tf.device(HOST):
                hvd.allreduce(tf.constant(numbers), name=f"{self._name}.trial", op=hvd.Sum, process_set=ranks).numpy()

        ranks = _job.process_set()
        if ranks.size() == 1:
            return None
        compressed = HorovodWire(self._name, ranks) if self.compression != "none" else None
        with watch.waiting(f"{self._name}.trial"):
            wire = self._decide(hvd, by_horovod, sum(int(np.prod(v.shape)) for v in variables), _SPARSE in kinds)
        return wire or compressed

    def _through_wire(
        self, gradients: Sequence[Any], variables: Sequence[Any], groups: dict[tf.DType, list[int]], means: list[Any]
    ) -> None:
        """Put the means of dense gradients into a list, by one operation on numpy arrays, in which the flag goes along.

        Args:
            gradients: of all variables.
            variables: what they belong to.
            groups: the places of those that are dense, by the type in which they travel.
            means: of all variables.
        """
        sizes = [int(np.prod(variable.shape)) for variable in variables]
        large = math.inf if self.compression != "none" else _LARGE
        arrays: list[tuple[tf.DType, list[int]]] = []
        for dtype, places in (groups or {tf.float32: []}).items():
            arrays.append((dtype, [i for i in places if sizes[i] < large]))  # small ones go together
            arrays += [(dtype, [i]) for i in places if sizes[i] >= large]
        order = [i for _, places in arrays for i in places]
        self._set_up([variables[i].shape for i in order], self._wire, _EXTRA)
        names = [getattr(variables[i], "path", variables[i].name) for i in order]
        ends, compressor = np.cumsum([sizes[i] for i in order]), self._compressor

        def add_up(*packed: np.ndarray) -> list[Any]:
            return self._add_up(packed, names, ends, compressor)

        packed = [_packed([to_dense(gradients[i], variables[i]) for i in places], dtype) for dtype, places in arrays]
        *sums, self._taken = tf.numpy_function(add_up, packed, [*(dtype for dtype, _ in arrays), tf.bool])
        self._taken.set_shape([])
        for mean, (_, places) in zip(sums, arrays, strict=True):
            own = [sizes[i] for i in places]
            mean.set_shape([sum(own)])
            for i, part in zip(places, tf.split(mean, own) if len(own) > 1 else [mean], strict=False):
                means[i] = tf.cast(tf.reshape(part, variables[i].shape), variables[i].dtype)

    def _add_up(
        self, packed: Sequence[np.ndarray], names: list[str], ends: np.ndarray, compressor: Compressor | None
    ) -> list[Any]:
        """The arrays' means over all ranks, in new memory, and whether the step may be taken.

        The numbers that travel beside them are the last ones of each type's buffer.
        """
        self._broken = _first_broken(packed, names, ends) if exchange.guarded else ""
        scale = 1 if compressor else 1 / self._wire.size
        means: list[Any] = [None] * len(packed)
        heard = broken = 0.0
        for dtype in dict.fromkeys(array.dtype for array in packed):
            own = [i for i, array in enumerate(packed) if array.dtype == dtype]
            begins = np.cumsum([0, *(_rounded_up(packed[i].size) for i in own[:-1])])
            length = begins[-1] + packed[own[-1]].size
            buffer = _aligned(length + _EXTRA, dtype)
            for i, begin in zip(own, begins.tolist(), strict=True):
                means[i] = buffer[begin : begin + packed[i].size]
                np.multiply(packed[i], dtype.type(scale), out=means[i])
            buffer[length:] = exchange.flag, bool(self._broken)
            with watch.waiting(self._name):
                if compressor:
                    compressor.average(buffer, self._wire)
                else:
                    self._wire.sum(buffer)
            heard, broken = max(heard, buffer[-2]), max(broken, buffer[-1])
            if compressor and exchange.guarded and not np.isfinite(buffer.sum()):
                broken = max(broken, not np.isfinite(buffer).all())  # a mean that overflowed
        exchange.heard |= bool(heard > 0)
        return [*means, np.bool_(broken == 0)]

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
        ranks, name = _job.process_set(), f"{self._name}.kinds"
        if ranks.size() == 1:
            return kinds
        wire = _job.mpi_wire(hvd, ranks)
        with watch.waiting(name), tf.device(HOST):
            if wire is not None:
                return np.max(wire.gather(kinds), axis=0).tolist()
            local = tf.constant(kinds, tf.int32)
            return hvd.allreduce(local, op=hvd.Max, name=name, process_set=ranks).numpy().tolist()

    def _wire_dtype(self, variable: Any) -> tf.DType:
        dtype = tf.as_dtype(variable.dtype)
        if self.compression != "none":
            return tf.float32
        narrow = (tf.bfloat16,) if self._wire is None else (tf.bfloat16, tf.float16)
        return tf.float32 if dtype in narrow else dtype  # Horovod knows no bfloat16, and MPI no float16 either


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


def _first_broken(arrays: Sequence[np.ndarray], names: list[str], ends: np.ndarray) -> str:
    """The name of the first gradient that is not finite, in arrays of many; "" where all are."""
    begin = 0
    for array in arrays:
        if not np.isfinite(array.sum()) and not np.isfinite(array).all():
            return names[int(np.searchsorted(ends, begin + int(np.argmin(np.isfinite(array))), side="right"))]
        begin += array.size
    return ""


def _packed(tensors: Sequence[tf.Tensor], dtype: tf.DType) -> tf.Tensor:
    """The tensors' numbers, one after the other."""
    flat = [tf.reshape(tf.cast(tensor, dtype), [-1]) for tensor in tensors]
    return flat[0] if len(flat) == 1 else tf.concat([tf.zeros([0], dtype), *flat], 0)


def _rounded_up(elements: int) -> int:
    """To where the next array is aligned too, whatever its type."""
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _aligned(elements: int, dtype: np.dtype) -> np.ndarray:
    """A new array where TensorFlow takes arrays as they are; others it copies."""
    memory = np.empty(elements * dtype.itemsize + _ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % _ALIGNMENT
    return memory[offset : offset + elements * dtype.itemsize].view(dtype)


def _either(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> None:
    if tf.executing_eagerly():
        yes() if condition else no()
    else:
        tf.cond(condition, yes, no)

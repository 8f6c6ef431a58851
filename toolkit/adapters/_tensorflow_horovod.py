"""Gradients of TensorFlow's through Horovod's operations on tensors, and what travels beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from toolkit import watch
from toolkit.adapters import _job, _reduction
from toolkit.adapters._reduction import exchange

HOST = "CPU:0"  # where numbers are that the ranks tell each other, also beside a GPU
WHOLE, ELSEWHERE = -2, -1  # no gradient is broken; one is, but none of this rank's
_BUCKET = 25 * 2**20  # bytes of a GPU's gradients that travel together, while the backward pass goes on


class Exchange:
    """What travels beside the gradients through Horovod, in a graph; made by the first averager that does that.

    The variables are in the host's memory, where reading them waits for nothing that a GPU has yet to do.
    """

    def __init__(self) -> None:
        self.flag = tf.Variable(float(exchange.flag), trainable=False)
        self.heard = tf.Variable(0.0, trainable=False)  # above 0: a rank's flag was up, or a mean not finite
        self.broken = tf.Variable(WHOLE, trainable=False)  # one of the two above, or the place of a name
        self.guarded = tf.Variable(exchange.guarded, trainable=False)
        self.names: list[str] = []
        self.told: bool | None = None  # what `flag` and `guarded` hold: an assignment takes as long as three readings


_exchanges: list[Exchange] = []  # one, once it is made


def in_graph() -> Exchange:
    """What travels beside the gradients, made where it is not there yet."""
    if not _exchanges:
        with tf.init_scope(), tf.device(HOST):
            _exchanges.append(Exchange())
    return _exchanges[0]


def exchange_flag(flag: bool | None) -> tuple[bool, str | None]:
    """See `toolkit.adapters.Adapter.exchange_flag`."""
    heard, broken = _reduction.exchange_flag(flag)
    for graph in _exchanges:
        heard_in_graph = float(graph.heard) > 0  # the one thing that every step reads; in half the time of .numpy()
        place = int(graph.broken) if heard_in_graph else WHOLE
        if flag is not graph.told:
            graph.told = flag
            graph.flag.assign(float(flag or 0))
            graph.guarded.assign(flag is not None)
        if heard_in_graph:
            graph.heard.assign(0.0)
            graph.broken.assign(WHOLE)
        heard |= heard_in_graph
        if broken is None and place != WHOLE:
            broken = "" if place == ELSEWHERE else graph.names[place]
    return heard, broken


def average_dense(
    name: str, gradients: Sequence[Any], variables: Sequence[Any], groups: dict[tf.DType, list[int]], means: list[Any]
) -> None:
    """Put the means of dense gradients into a list.

    On a GPU they travel from where they are, in several buckets, those first whose gradients are there first.
    The flag goes along in the first bucket of floating-point numbers.

    Args:
        name: of the operations.
        gradients: of all variables.
        variables: what they belong to.
        groups: the places of those that are dense, by the type in which they travel.
        means: of all variables.
    """
    if not any(dtype.is_floating for dtype in groups):
        groups = {**groups, tf.float32: []}
    carrier = next(dtype for dtype in groups if dtype.is_floating)
    for dtype, places in groups.items():
        for number, bucket in enumerate(_buckets(places, variables, dtype)):
            packed = [tf.cast(to_dense(gradients[i], variables[i]), dtype) for i in bucket]
            carries = dtype == carrier and number == 0
            reduced = _all_reduce(packed, f"{name}.{dtype.name}.{number}", carries)
            for i, mean in zip(bucket, reduced, strict=True):
                means[i] = tf.cast(mean, variables[i].dtype)


def _all_reduce(packed: list[tf.Tensor], name: str, carries: bool) -> list[tf.Tensor]:
    """The means over all ranks of tensors of one dtype, with or without the flag beside them."""
    graph, ranks = in_graph(), _job.process_set()
    if carries:
        with tf.device(HOST):
            packed = [*packed, tf.cast(graph.flag, packed[0].dtype if packed else tf.float32)]
    with waiting(name):
        reduced = hvd.grouped_allreduce(
            packed,
            op=hvd.Average,
            name=name,
            device_dense=where_reduced(),
            ignore_name_scope=True,
            process_set=ranks,
        )
    if carries:
        with tf.device(HOST):
            graph.heard.assign_add(tf.cast(reduced.pop(), tf.float32))
    return reduced


def average_sparse(name: str, gradient: Any, variable: Any) -> tf.IndexedSlices:
    """The mean of row-sparse gradients: every rank's rows, those of the same index summed."""
    if gradient is None:
        gradient = tf.IndexedSlices(tf.zeros([0, *variable.shape[1:]], variable.dtype), tf.zeros([0], tf.int64))
    indices, values = _sum_duplicates(tf.cast(gradient.indices, tf.int64), gradient.values)
    wire = tf.float32 if values.dtype == tf.bfloat16 else values.dtype
    ranks = _job.process_set()
    if ranks.size() > 1:
        with tf.init_scope():
            _job.keep_quick(hvd)  # also where the dense gradients beside it are added up by MPI
        with waiting(name), tf.device(where_reduced()):
            indices = hvd.allgather(indices, f"{name}.indices", ignore_name_scope=True, process_set=ranks)
            values = hvd.allgather(tf.cast(values, wire), f"{name}.values", ignore_name_scope=True, process_set=ranks)
    # Optimizers need unique indices; and sums of duplicates inside them may depend on threads.
    indices, values = _sum_duplicates(indices, values / ranks.size())
    return tf.IndexedSlices(
        tf.cast(values, variable.dtype), indices, dense_shape=tf.constant(list(variable.shape), tf.int64)
    )


class HorovodWire:
    """See `toolkit.compression.Wire`."""

    def __init__(self, name: str, ranks: Any) -> None:
        self._name, self._ranks = name, ranks
        self.rank: int = ranks.rank()
        self.size: int = ranks.size()

    def sum(self, array: np.ndarray) -> None:
        """See `toolkit.compression.Wire.sum`."""
        name = f"{self._name}.sum{array.size}"
        with tf.device(HOST):
            array[...] = hvd.allreduce(tf.constant(array), name=name, op=hvd.Sum, process_set=self._ranks).numpy()

    def all_to_all(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_to_all`."""
        name = f"{self._name}.all_to_all{send.nbytes}"
        with tf.device(HOST):
            rows = hvd.alltoall(tf.constant(_bytes(send)), name=name, process_set=self._ranks)
        _bytes(received)[...] = rows.numpy()

    def all_gather(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_gather`."""
        name = f"{self._name}.all_gather{send.nbytes}"
        with tf.device(HOST):
            rows = hvd.allgather(tf.constant(_bytes(send[None])), name, process_set=self._ranks)
        _bytes(received)[...] = rows.numpy()


def _bytes(array: np.ndarray) -> np.ndarray:
    """An array's rows as bytes of the same memory: Horovod knows few types."""
    return array.reshape(len(array), -1).view(np.uint8)


def waiting(name: str) -> Any:
    """Tells the watch of an operation; while a function is traced none is done."""
    return watch.waiting(name) if tf.executing_eagerly() else contextlib.nullcontext()


def where_reduced() -> str:
    """The device where Horovod adds up gradients; "": the one that has them."""
    return "" if _job.reduces_on_gpu() else HOST


def _buckets(places: list[int], variables: Sequence[Any], dtype: tf.DType) -> list[list[int]]:
    """The places of gradients of one dtype that travel together.

    On a CPU all do: what would travel early takes cores from the backward pass. From a GPU the last layers' go first,
    which the backward pass reaches first.
    """
    if not _job.reduces_on_gpu():
        return [places]
    buckets: list[list[int]] = [[]]
    size = 0
    for i in reversed(places):
        bytes_more = int(np.prod(variables[i].shape)) * dtype.size
        if buckets[-1] and size + bytes_more > _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(i)
        size += bytes_more
    return buckets


def to_dense(gradient: Any, variable: Any) -> tf.Tensor:
    """The gradient as a tensor of the variable's shape: one that is missing is zero."""
    return tf.zeros(variable.shape, variable.dtype) if gradient is None else tf.convert_to_tensor(gradient)


def _sum_duplicates(indices: tf.Tensor, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    unique, positions = tf.unique(indices)
    return unique, tf.math.unsorted_segment_sum(values, positions, tf.size(unique))

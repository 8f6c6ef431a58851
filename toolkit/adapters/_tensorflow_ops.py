"""Averaging of TensorFlow gradients over all ranks, for the tensorflow adapter and for Keras on TensorFlow."""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from toolkit import watch
from toolkit.adapters import _job, _reduction
from toolkit.adapters._reduction import exchange
from toolkit.compression import Compressor
from toolkit.errors import UsageError

# What a variable's gradient is on a rank; where ranks differ, the largest is what all of them send.
_MISSING, _SPARSE, _DENSE = 0, 1, 2
_UNDECIDED = "undecided"
_ALIGNMENT = 64  # bytes
_LARGE = 2**16  # elements from which another way through memory takes longer than another array
_EXTRA = 2  # numbers that travel beside the gradients
_HOST = "CPU:0"  # where numbers are that the ranks tell each other, also beside a GPU
_BUCKET = 25 * 2**20  # bytes of a GPU's gradients that travel together, while the backward pass goes on


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
    ranks = _job.process_set()
    wire = _job.mpi_wire(hvd, ranks)
    with watch.waiting("average()"), tf.device(_HOST):
        if wire is not None:
            return wire.summed(vector)
        return hvd.allreduce(tf.constant(vector), op=hvd.Sum, name="hvdkit.sum", process_set=ranks).numpy()


def gather(value: Any, process_set: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    wire = _job.mpi_wire(hvd, process_set)
    with watch.waiting("gather()", all_groups=process_set is not _job.process_set()):
        if wire is not None:
            return wire.gather(value)
        data = np.frombuffer(pickle.dumps(value), np.uint8)  # Horovod's own way makes a Python number of each byte
        with tf.device(_HOST):
            lengths = hvd.allgather(tf.constant([len(data)]), "hvdkit.gather.lengths", process_set=process_set).numpy()
            gathered = hvd.allgather(tf.constant(data), "hvdkit.gather", process_set=process_set).numpy()
    return [pickle.loads(part.tobytes()) for part in np.split(gathered, np.cumsum(lengths)[:-1])]


def broadcast(array: np.ndarray) -> np.ndarray:
    """The root's array of uint8 on every rank; there is one of its length on each."""
    if not array.size:
        return array
    name, ranks = "hvdkit.broadcast", _job.process_set()
    with watch.waiting("broadcast_state()"), tf.device(_HOST):
        return hvd.broadcast(tf.constant(array), _job.root_rank(), name, process_set=ranks).numpy()


def visible_gpus() -> int:
    """GPUs that TensorFlow sees."""
    return len(tf.config.list_physical_devices("GPU"))


def use_gpu(number: int) -> str:
    """Have TensorFlow see this GPU alone, and take of its memory what it needs; returns its name."""
    gpu = tf.config.list_physical_devices("GPU")[number]
    _show([gpu])
    tf.config.experimental.set_memory_growth(gpu, True)
    return "GPU:0"


def use_cpu() -> None:
    """Have TensorFlow see no GPU."""
    if visible_gpus():
        _show([])


def _show(gpus: list[Any]) -> None:
    """Have TensorFlow see these GPUs alone."""
    try:
        tf.config.set_visible_devices(gpus, "GPU")
    except RuntimeError:
        raise UsageError(
            "TensorFlow ran an operation before start(), which was to choose its GPU: call start() first."
        ) from None


def peak_memory() -> int:
    """The most bytes of the GPU's memory that tensors had at a time."""
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def check_place(model: Any) -> None:
    """Nothing: TensorFlow sees no device but this worker's."""


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
    """What travels beside the gradients through Horovod, in a graph; made by the first averager that does that.

    The variables are in the host's memory, where reading them waits for nothing that a GPU has yet to do.
    """

    def __init__(self) -> None:
        self.flag = tf.Variable(float(exchange.flag), trainable=False)
        self.heard = tf.Variable(0.0, trainable=False)  # above 0: a rank's flag was up, or a mean not finite
        self.broken = tf.Variable(_WHOLE, trainable=False)  # one of the two below, or the place of a name
        self.guarded = tf.Variable(exchange.guarded, trainable=False)
        self.names: list[str] = []
        self.told: bool | None = None  # what `flag` and `guarded` hold: an assignment takes as long as three readings


_WHOLE, _ELSEWHERE = -2, -1
_exchanges: list[_Exchange] = []  # one, once it is made


def _exchange() -> _Exchange:
    if not _exchanges:
        with tf.init_scope(), tf.device(_HOST):
            _exchanges.append(_Exchange())
    return _exchanges[0]


def exchange_flag(flag: bool | None) -> tuple[bool, str | None]:
    """See `toolkit.adapters.Adapter.exchange_flag`."""
    heard, broken = _reduction.exchange_flag(flag)
    for graph in _exchanges:
        heard_in_graph = float(graph.heard) > 0  # the one thing that every step reads; in half the time of .numpy()
        place = int(graph.broken) if heard_in_graph else _WHOLE
        if flag is not graph.told:
            graph.told = flag
            graph.flag.assign(float(flag or 0))
            graph.guarded.assign(flag is not None)
        if heard_in_graph:
            graph.heard.assign(0.0)
            graph.broken.assign(_WHOLE)
        heard |= heard_in_graph
        if broken is None and place != _WHOLE:
            broken = "" if place == _ELSEWHERE else graph.names[place]
    return heard, broken


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
                means[i] = self._average_sparse(gradients[i], variables[i], f"{self._name}.sparse{i}")
            elif kind == _DENSE:
                dense.setdefault(self._wire_dtype(variables[i]), []).append(i)
        if self._wire is not None:
            self._through_wire(gradients, variables, dense, means)
            return means
        if _job.process_set().size() > 1:
            self._through_horovod(gradients, variables, dense, means)
            return means
        for i in itertools.chain(*dense.values()):
            means[i] = _to_dense(gradients[i], variables[i])
        graph = _exchange()
        with tf.device(_HOST):
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
        graph = _exchange()
        taken = tf.cond(graph.guarded, lambda: _are_finite(means), lambda: tf.constant(True))
        key = tuple(id(v) for v in variables)
        if key not in self._places:
            self._places[key] = len(graph.names), list(variables)  # held, so that ids stay theirs
            graph.names += [getattr(v, "path", v.name) for v in variables]

        def leave_out() -> None:
            finite = tf.stack([_are_finite([g]) for g in gradients])
            first = self._places[key][0] + tf.argmin(tf.cast(finite, tf.int32), output_type=tf.int32)
            place = tf.where(tf.reduce_all(finite), _ELSEWHERE, first)
            with tf.device(_HOST):
                graph.broken.assign(tf.where(graph.broken == _WHOLE, place, graph.broken))
                graph.heard.assign_add(1.0)

        _either(taken, apply, leave_out)

    def _choose(self, variables: Sequence[Any], kinds: Sequence[int]) -> Any:
        def by_horovod(numbers: np.ndarray) -> None:
            with tf.device(_HOST):
                hvd.allreduce(tf.constant(numbers), name=f"{self._name}.trial", op=hvd.Sum, process_set=ranks).numpy()

        ranks = _job.process_set()
        if ranks.size() == 1:
            return None
        compressed = _HorovodWire(self._name, ranks) if self.compression != "none" else None
        if _SPARSE in kinds and self._reducer == "auto":  # whose rows Horovod gathers
            return compressed
        with watch.waiting(f"{self._name}.trial"):
            wire = _reduction.choose(self._reducer, hvd, by_horovod, sum(int(np.prod(v.shape)) for v in variables))
        return wire or compressed

    def _through_horovod(
        self, gradients: Sequence[Any], variables: Sequence[Any], groups: dict[tf.DType, list[int]], means: list[Any]
    ) -> None:
        """Put the means of dense gradients into a list, by Horovod's operations; arguments as of `_through_wire`.

        On a GPU they travel from where they are, in several buckets, those first whose gradients are there first.
        The flag goes along in the first bucket of floating-point numbers.
        """
        if not any(dtype.is_floating for dtype in groups):
            groups = {**groups, tf.float32: []}
        carrier = next(dtype for dtype in groups if dtype.is_floating)
        for dtype, places in groups.items():
            for number, bucket in enumerate(_buckets(places, variables, dtype)):
                packed = [tf.cast(_to_dense(gradients[i], variables[i]), dtype) for i in bucket]
                carries = dtype == carrier and number == 0
                reduced = self._all_reduce(packed, f"{self._name}.{dtype.name}.{number}", carries)
                for i, mean in zip(bucket, reduced, strict=True):
                    means[i] = tf.cast(mean, variables[i].dtype)

    def _all_reduce(self, packed: list[tf.Tensor], name: str, carries: bool) -> list[tf.Tensor]:
        """The means over all ranks of tensors of one dtype, with or without the flag beside them."""
        graph, ranks = _exchange(), _job.process_set()
        if carries:
            with tf.device(_HOST):
                packed = [*packed, tf.cast(graph.flag, packed[0].dtype if packed else tf.float32)]
        with _waiting(name):
            reduced = hvd.grouped_allreduce(
                packed,
                op=hvd.Average,
                name=name,
                device_dense=_where_reduced(),
                ignore_name_scope=True,
                process_set=ranks,
            )
        if carries:
            with tf.device(_HOST):
                graph.heard.assign_add(tf.cast(reduced.pop(), tf.float32))
        return reduced

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

        packed = [_packed([_to_dense(gradients[i], variables[i]) for i in places], dtype) for dtype, places in arrays]
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
        with watch.waiting(name), tf.device(_HOST):
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

    def _average_sparse(self, gradient: Any, variable: Any, name: str) -> tf.IndexedSlices:
        """The mean of row-sparse gradients: every rank's rows, those of the same index summed."""
        if gradient is None:
            gradient = tf.IndexedSlices(tf.zeros([0, *variable.shape[1:]], variable.dtype), tf.zeros([0], tf.int64))
        indices, values = _sum_duplicates(tf.cast(gradient.indices, tf.int64), gradient.values)
        wire = tf.float32 if values.dtype == tf.bfloat16 else values.dtype
        ranks = _job.process_set()
        if ranks.size() > 1:
            with _waiting(name), tf.device(_where_reduced()):
                indices = hvd.allgather(indices, f"{name}.indices", ignore_name_scope=True, process_set=ranks)
                values = hvd.allgather(
                    tf.cast(values, wire), f"{name}.values", ignore_name_scope=True, process_set=ranks
                )
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


class _HorovodWire:
    """See `toolkit.compression.Wire`."""

    def __init__(self, name: str, ranks: Any) -> None:
        self._name, self._ranks = name, ranks
        self.rank: int = ranks.rank()
        self.size: int = ranks.size()

    def sum(self, array: np.ndarray) -> None:
        """See `toolkit.compression.Wire.sum`."""
        name = f"{self._name}.sum{array.size}"
        with tf.device(_HOST):
            array[...] = hvd.allreduce(tf.constant(array), name=name, op=hvd.Sum, process_set=self._ranks).numpy()

    def all_to_all(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_to_all`."""
        name = f"{self._name}.all_to_all{send.nbytes}"
        with tf.device(_HOST):
            rows = hvd.alltoall(tf.constant(_bytes(send)), name=name, process_set=self._ranks)
        _bytes(received)[...] = rows.numpy()

    def all_gather(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_gather`."""
        name = f"{self._name}.all_gather{send.nbytes}"
        with tf.device(_HOST):
            rows = hvd.allgather(tf.constant(_bytes(send[None])), name, process_set=self._ranks)
        _bytes(received)[...] = rows.numpy()


def _bytes(array: np.ndarray) -> np.ndarray:
    """An array's rows as bytes of the same memory: Horovod knows few types."""
    return array.reshape(len(array), -1).view(np.uint8)


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


def _where_reduced() -> str:
    """The device where Horovod adds up gradients; "": the one that has them."""
    return "" if _job.reduces_on_gpu() else _HOST


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


def _to_dense(gradient: Any, variable: Any) -> tf.Tensor:
    return tf.zeros(variable.shape, variable.dtype) if gradient is None else tf.convert_to_tensor(gradient)


def _sum_duplicates(indices: tf.Tensor, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    unique, positions = tf.unique(indices)
    return unique, tf.math.unsorted_segment_sum(values, positions, tf.size(unique))

"""TensorFlow's threads, devices and random state, and sums and values of all ranks, for its adapter and Keras on it."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from toolkit import tuning, watch
from toolkit.adapters import _job
from toolkit.adapters import _tensorflow_batch_norm as batch_norm  # noqa: F401 - for Keras
from toolkit.adapters._tensorflow_average import GradientAverager as GradientAverager
from toolkit.adapters._tensorflow_horovod import HOST
from toolkit.adapters._tensorflow_horovod import exchange_flag as exchange_flag
from toolkit.errors import UsageError

_GPU = "GPU:0"  # a worker's own: it sees no other


_threads = (0, 0)  # that `set_threads` has given TensorFlow: within an operation, and between operations


def users_threads() -> str:
    """How the user has set TensorFlow's compute threads, in words; "" where not."""
    return _users("TF_NUM_INTRAOP_THREADS", tf.config.threading.get_intra_op_parallelism_threads(), _threads[0])


def _users(variable: str, now: int, ours: int) -> str:
    called = "" if now in (0, ours) else f"tf.config.threading has {now}"
    return tuning.what_is_set([variable]) or called


def set_threads(threads: int) -> None:
    """Give TensorFlow this many compute threads; must come before its first operation."""
    global _threads
    between = max(2, threads)  # one for independent operations would let a Python data generator wait for itself
    users = _users("TF_NUM_INTEROP_THREADS", tf.config.threading.get_inter_op_parallelism_threads(), _threads[1])
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        if users:
            _job.explain(f"tuning: threads for independent operations left alone: {users}")
        else:
            tf.config.threading.set_inter_op_parallelism_threads(between)
        _threads = threads, 0 if users else between
    except RuntimeError:
        warnings.warn("TensorFlow ran an operation before start(): its thread counts stay as they are.", stacklevel=3)


def all_reduce_sum(vector: np.ndarray) -> np.ndarray:
    """The sum of a float64 vector over all ranks."""
    ranks = _job.process_set()
    wire = _job.mpi_wire(hvd, ranks)
    with watch.waiting("average()"), tf.device(HOST):
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
        with tf.device(HOST):
            lengths = hvd.allgather(tf.constant([len(data)]), "hvdkit.gather.lengths", process_set=process_set).numpy()
            gathered = hvd.allgather(tf.constant(data), "hvdkit.gather", process_set=process_set).numpy()
    return [pickle.loads(part.tobytes()) for part in np.split(gathered, np.cumsum(lengths)[:-1])]


def broadcast(array: np.ndarray) -> np.ndarray:
    """The root's array of uint8 on every rank; there is one of its length on each."""
    if not array.size:
        return array
    name, ranks = "hvdkit.broadcast", _job.process_set()
    with watch.waiting("broadcast_state()"), tf.device(HOST):
        return hvd.broadcast(tf.constant(array), _job.root_rank(), name, process_set=ranks).numpy()


def visible_gpus() -> int:
    """GPUs that TensorFlow sees."""
    return len(tf.config.list_physical_devices("GPU"))


def use_gpu(number: int) -> str:
    """Have TensorFlow see this GPU alone, and take of its memory what it needs or the script set; returns its name."""
    gpu = tf.config.list_physical_devices("GPU")[number]
    with _before_tensorflow_begins():
        tf.config.set_visible_devices([gpu], "GPU")
        if not tf.config.get_logical_device_configuration(gpu):  # else the script has set how much
            tf.config.experimental.set_memory_growth(gpu, True)
    return _GPU


def on_device(arrays: Sequence[np.ndarray]) -> tuple[tf.Tensor, ...]:
    """`Adapter.on_device`."""
    if not _job.has_gpu():
        return tuple(map(tf.constant, arrays))
    with tf.device(_GPU):
        return tuple(map(tf.constant, arrays))


def use_cpu() -> None:
    """Have TensorFlow see no GPU."""
    if visible_gpus():
        with _before_tensorflow_begins():
            tf.config.set_visible_devices([], "GPU")


@contextlib.contextmanager
def _before_tensorflow_begins() -> Iterator[None]:
    """Raise `UsageError` where TensorFlow has begun with its devices, and can't change them any more."""
    try:
        yield
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

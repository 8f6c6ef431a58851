"""One rank of a real all-reduce: `mpirun -np 2 python -m toolkit.doctor.all_reduce torch 2 cpu` (or gpu).

The bandwidths are those of NVIDIA's nccl-tests (doc/PERFORMANCE.md): algorithm bandwidth is a message's bytes over its
seconds; bus bandwidth is that times 2(n-1)/n for n ranks, which can be held against the bandwidth of a rank's link.
With "cpu" the messages lie in host memory, no GPU takes part, and TensorFlow's seconds hold its copies into and out of
a tensor. With "gpu" they lie on the GPU of each rank's local rank, and Horovod's NCCL adds them up there; the seconds
hold Horovod's agreement on each message, as a training step's do.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]  # a recipe does not look for modules in its working directory

import importlib
import json
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit import tuning

MARK = "hvdkit-all-reduce "
SMALL, LARGE = 1 << 20, 16 << 20  # bytes
ROUNDS = 7
LARGE_ON_GPU = 256 << 20  # bytes, from which on NCCL's bandwidth hardly grows
SLOW = 0.5  # seconds that a large message may take; on slower links the small one is measured
LATENCY_ROUNDS = 20

Reduce = Callable[[Any, str], Any]


@dataclass(frozen=True)
class Memory:
    """Where messages lie.

    Attributes:
        put: an array there, as `Reduce` takes it.
        get: what `Reduce` gave, as an array.
        largest: bytes of the largest message.
    """

    put: Callable[[np.ndarray], Any] = np.asarray
    get: Callable[[Any], np.ndarray] = np.asarray
    largest: int = LARGE


def measure(reduce: Reduce, rank: int, size: int, memory: Memory = Memory()) -> dict[str, Any]:
    """Bytes, seconds of a message (median) and of one number (median), after the sum was seen to be right.

    Args:
        reduce: sums what `memory.put` gave over the ranks; its second argument names the operation, alike on all ranks.
        rank: this one's.
        size: ranks.
        memory: where messages lie.

    Raises:
        RuntimeError: the sum is wrong.
    """
    one = memory.put(np.ones(1, np.float32))
    ramp = (np.arange(SMALL // 4) % 97).astype(np.float32)
    if not np.array_equal(memory.get(reduce(memory.put(ramp * (rank + 1)), "right")), ramp * (size * (size + 1) // 2)):
        raise RuntimeError(f"the sum over {size} ranks is wrong")
    mine = min(_seconds(reduce, memory.put(ramp), one, "small", 4)[1:])  # the machine may have been busy otherwise
    # All ranks must choose alike, so by their mean.
    mean = float(memory.get(reduce(memory.put(np.full(1, mine, np.float32)), "choice"))[0]) / size
    bytes_of_message = memory.largest if mean * memory.largest / SMALL < SLOW else SMALL
    data = memory.put(np.ones(bytes_of_message // 4, np.float32))
    _seconds(reduce, data, one, "large", 1)
    return {
        "bytes": bytes_of_message,
        "seconds": statistics.median(_seconds(reduce, data, one, "large", ROUNDS)),
        "latency": statistics.median(_seconds(reduce, one, one, "one", LATENCY_ROUNDS)),
    }


def _seconds(reduce: Reduce, data: Any, one: Any, name: str, rounds: int) -> list[float]:
    """Seconds of each round, that all ranks begin together."""
    found = []
    for _ in range(rounds):
        reduce(one, "together")
        began = time.perf_counter()
        reduce(data, name)
        found.append(time.perf_counter() - began)
    return found


def _torch(hvd: Any, gpu: int | None) -> tuple[Reduce, Memory]:
    import torch

    if gpu is None:
        return lambda data, name: hvd.allreduce(torch.from_numpy(data), op=hvd.Sum, name=name).numpy(), Memory()
    torch.cuda.set_device(gpu)

    def reduce(data: Any, name: str) -> Any:
        found = hvd.allreduce(data, op=hvd.Sum, name=name)
        torch.cuda.synchronize()
        return found

    return reduce, Memory(lambda array: torch.from_numpy(array).cuda(), lambda it: it.cpu().numpy(), LARGE_ON_GPU)


def _tensorflow(hvd: Any, gpu: int | None) -> tuple[Reduce, Memory]:
    import tensorflow as tf

    if gpu is not None:
        own = tf.config.list_physical_devices("GPU")[gpu]
        tf.config.set_visible_devices(own, "GPU")
        tf.config.experimental.set_memory_growth(own, True)
    device = "/CPU:0" if gpu is None else "/GPU:0"

    def reduce(data: Any, name: str) -> Any:
        with tf.device(device):
            found = hvd.allreduce(tf.convert_to_tensor(data), op=hvd.Sum, name=name)
            return found.numpy() if gpu is None else _waited(found)

    def _waited(found: Any) -> Any:
        found[0].numpy()  # a number read back is there when the sum is
        return found

    def put(array: np.ndarray) -> Any:
        with tf.device(device):
            return tf.identity(tf.constant(array))

    return reduce, Memory() if gpu is None else Memory(put, lambda it: it.numpy(), LARGE_ON_GPU)


def _run(framework: str, expected: int, device: str) -> dict[str, Any] | None:
    """This rank's part; the result on rank 0.

    Raises:
        RuntimeError: the ranks don't find each other, Horovod has no NCCL for a GPU, or the sum is wrong.
    """
    hvd = importlib.import_module(f"horovod.{framework}")
    hvd.init()
    if hvd.size() != expected:
        raise RuntimeError(f"{expected} ranks were started and this one sees {hvd.size()}: mpirun is of another MPI")
    if device == "gpu" and not hvd.nccl_built():
        raise RuntimeError("Horovod was built without NCCL")
    make = {"torch": _torch, "tensorflow": _tensorflow}[framework]
    reduce, memory = make(hvd, hvd.local_rank() if device == "gpu" else None)
    result = measure(reduce, hvd.rank(), hvd.size(), memory)
    rank = hvd.rank()
    hvd.shutdown()
    return None if rank else {**result, "ranks": expected, "device": device}


def main(framework: str, expected: int, device: str = "cpu", before: Callable[[], dict[str, Any]] = dict) -> int:
    """Take part, print what was measured on rank 0, and where it fails why, with this host's name.

    Args:
        framework: torch or tensorflow.
        expected: ranks.
        device: "cpu"; or "gpu", each rank its own by its local rank.
        before: measures something else before Horovod starts, whose results are added.
    """
    os.environ.update(tuning.choose_environment().environment)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        more = before()
        result = _run(framework, expected, device)
    except BaseException as error:
        failure = {"host": socket.gethostname(), "error": f"{type(error).__name__}: {error}"}
        os.write(1, f"\n{MARK}{json.dumps(failure)}\n".encode())
        return 1
    if result is not None:
        os.write(1, f"\n{MARK}{json.dumps({**result, **more})}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))

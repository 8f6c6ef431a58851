"""One rank of a real all-reduce: `mpirun -np 2 python -m toolkit.doctor.all_reduce torch 2`.

The bandwidths are those of NVIDIA's nccl-tests (doc/PERFORMANCE.md): algorithm bandwidth is a message's bytes over its
seconds; bus bandwidth is that times 2(n-1)/n for n ranks, which can be held against the bandwidth of a rank's link.
The messages lie in host memory: no GPU takes part. TensorFlow's seconds hold its copies into and out of a tensor.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]  # a recipe does not look for modules in its working directory

import json
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from toolkit import tuning

MARK = "hvdkit-all-reduce "
SMALL, LARGE = 1 << 20, 16 << 20  # bytes
ROUNDS = 7
SLOW = 0.5  # seconds that a large message may take; on slower links the small one is measured
LATENCY_ROUNDS = 20

Reduce = Callable[[np.ndarray, str], np.ndarray]


def measure(reduce: Reduce, rank: int, size: int) -> dict[str, Any]:
    """Bytes, seconds of a message (median) and of one number (median), after the sum was seen to be right.

    Args:
        reduce: sums an array over the ranks; its second argument names the operation, alike on all ranks.
        rank: this one's.
        size: ranks.

    Raises:
        RuntimeError: the sum is wrong.
    """
    one = np.ones(1, np.float32)
    ramp = (np.arange(SMALL // 4) % 97).astype(np.float32)
    if not np.array_equal(reduce(ramp * (rank + 1), "right"), ramp * (size * (size + 1) // 2)):
        raise RuntimeError(f"the sum over {size} ranks is wrong")
    mine = min(_seconds(reduce, ramp, "small", 4)[1:])  # the machine may have been busy with something else
    # All ranks must choose alike, so by their mean.
    mean = float(reduce(np.full(1, mine, np.float32), "choice")[0]) / size
    data = np.ones((LARGE if mean * LARGE / SMALL < SLOW else SMALL) // 4, np.float32)
    _seconds(reduce, data, "large", 1)
    return {
        "bytes": data.nbytes,
        "seconds": statistics.median(_seconds(reduce, data, "large", ROUNDS)),
        "latency": statistics.median(_seconds(reduce, one, "one", LATENCY_ROUNDS)),
    }


def _seconds(reduce: Reduce, data: np.ndarray, name: str, rounds: int) -> list[float]:
    """Seconds of each round, that all ranks begin together."""
    found = []
    for _ in range(rounds):
        reduce(np.ones(1, np.float32), "together")
        began = time.perf_counter()
        reduce(data, name)
        found.append(time.perf_counter() - began)
    return found


def _torch() -> tuple[Reduce, Any]:
    import horovod.torch as hvd
    import torch

    def reduce(data: np.ndarray, name: str) -> np.ndarray:
        return hvd.allreduce(torch.from_numpy(data), op=hvd.Sum, name=name).numpy()

    return reduce, hvd


def _tensorflow() -> tuple[Reduce, Any]:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    def reduce(data: np.ndarray, name: str) -> np.ndarray:
        with tf.device("/CPU:0"):
            return hvd.allreduce(tf.convert_to_tensor(data), op=hvd.Sum, name=name).numpy()

    return reduce, hvd


def _run(framework: str, expected: int) -> dict[str, Any] | None:
    """This rank's part; the result on rank 0.

    Raises:
        RuntimeError: the ranks don't find each other, or the sum is wrong.
    """
    reduce, hvd = {"torch": _torch, "tensorflow": _tensorflow}[framework]()
    hvd.init()
    if hvd.size() != expected:
        raise RuntimeError(f"{expected} ranks were started and this one sees {hvd.size()}: mpirun is of another MPI")
    result = measure(reduce, hvd.rank(), hvd.size())
    rank = hvd.rank()
    hvd.shutdown()
    return None if rank else {**result, "ranks": expected}


def main(framework: str, expected: int, before: Callable[[], dict[str, Any]] = dict) -> int:
    """Take part, print what was measured on rank 0, and where it fails why, with this host's name.

    Args:
        framework: torch or tensorflow.
        expected: ranks.
        before: measures something else before Horovod starts, whose results are added.
    """
    os.environ.update(tuning.choose_environment().environment)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        more = before()
        result = _run(framework, expected)
    except BaseException as error:
        failure = {"host": socket.gethostname(), "error": f"{type(error).__name__}: {error}"}
        os.write(1, f"\n{MARK}{json.dumps(failure)}\n".encode())
        return 1
    if result is not None:
        os.write(1, f"\n{MARK}{json.dumps({**result, **more})}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

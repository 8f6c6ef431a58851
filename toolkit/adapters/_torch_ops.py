"""Sums and values of all ranks, and torch's random state, for the torch adapter and Keras on torch."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from toolkit import tuning, watch
from toolkit.adapters import _job
from toolkit.adapters._shared import GPU_RANDOM
from toolkit.errors import UsageError

_device = torch.device("cpu")  # this worker's
_threads = torch.get_num_threads()  # torch's own choice, then what `set_threads` has given it
_copies: Any = None  # the stream of a GPU's on which arrays are copied there


def users_threads() -> str:
    """How the user has set torch's compute threads, in words; "" where not.

    torch does not tell whether its number was set. By itself it depends on MKL, which asks the launcher's variables
    too, so a script's call is seen by what it changes after this module was imported.
    """
    now = torch.get_num_threads()
    called = "" if now == _threads else f"torch.set_num_threads({now}) was called"
    return tuning.what_is_set(["MKL_NUM_THREADS"]) or called


def set_threads(threads: int) -> None:
    """Give torch this many compute threads."""
    global _threads
    _threads = threads
    torch.set_num_threads(threads)


def all_reduce_sum(vector: np.ndarray, name: str = "average()") -> np.ndarray:
    """The sum of a float64 vector over all ranks, for what the name tells the watch."""
    ranks = _job.process_set()
    wire = _job.mpi_wire(hvd, ranks)
    with watch.waiting(name):
        if wire is not None:
            return wire.summed(vector)
        return hvd.allreduce(torch.from_numpy(vector), op=hvd.Sum, name="hvdkit.sum", process_set=ranks).numpy()


def gather(value: Any, process_set: Any) -> list[Any]:
    """Every rank's value, in rank order; Horovod's own function for it knows no process sets."""
    wire = _job.mpi_wire(hvd, process_set)
    with watch.waiting("gather()", all_groups=process_set is not _job.process_set()):
        if wire is not None:
            return wire.gather(value)
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths = hvd.allgather(torch.tensor([len(data)]), "hvdkit.gather.lengths", process_set)
        gathered = hvd.allgather(data, "hvdkit.gather", process_set)
    return [pickle.loads(part.numpy().tobytes()) for part in gathered.split(lengths.tolist())]


def broadcast(array: np.ndarray) -> np.ndarray:
    """The root's array of uint8 on every rank; there is one of its length on each."""
    if not array.size:
        return array
    name, ranks = "hvdkit.broadcast", _job.process_set()
    with watch.waiting("broadcast_state()"):
        return hvd.broadcast(torch.tensor(array), _job.root_rank(), name, ranks).numpy()


def visible_gpus() -> int:
    """GPUs that torch can use: it counts those of a driver too old for its CUDA too."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def use_gpu(number: int) -> str:
    """Make this GPU the one that new tensors on "cuda", and Horovod, take; returns its name.

    Raises:
        UsageError: it can't be used.
    """
    global _device, _copies
    _device = torch.device("cuda", number)
    try:
        torch.cuda.set_device(_device)
        _copies = torch.cuda.Stream(_device)
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise UsageError(f"torch can't use {_device} ({why}): look at `hvdkit doctor`, or give --device cpu.") from None
    return str(_device)


def use_cpu() -> None:
    """Compute on the CPU: torch does, unless told otherwise."""


def on_device(arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
    """`Adapter.on_device`."""
    tensors = tuple(torch.from_numpy(np.asarray(array, order="C")) for array in arrays)
    if _copies is None:
        return tensors
    with torch.cuda.stream(_copies):  # in a thread this sets the GPU too
        there = tuple(tensor.pin_memory().to(_device, non_blocking=True) for tensor in tensors)
    _copies.synchronize()
    for tensor in there:  # else its memory could be filled again before the step that uses it is over
        tensor.record_stream(torch.cuda.default_stream(_device))
    return there


def peak_memory() -> int:
    """The most bytes of the GPU's memory that tensors had at a time."""
    return torch.cuda.max_memory_allocated()


def be_deterministic() -> None:
    """Have every operation of torch give the same bits in every run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses matrix products on a GPU
    torch.use_deterministic_algorithms(True)


def seed_random(seed: int) -> None:
    """Seed torch's global generator, and those of its GPUs."""
    torch.manual_seed(seed)


def export_random() -> dict[str, np.ndarray]:
    """The states of torch's global generator and, where this worker has a GPU, of the generator there."""
    gpu = {GPU_RANDOM: torch.cuda.get_rng_state().numpy().copy()} if _job.has_gpu() else {}
    return {"random/torch": torch.get_rng_state().numpy().copy(), **gpu}


def import_random(state: Mapping[str, np.ndarray]) -> None:
    """Put back what `export_random` gave; on another kind of device than there, the GPU's generator stays as it is."""
    torch.set_rng_state(torch.from_numpy(state["random/torch"].copy()))
    if _job.has_gpu() and GPU_RANDOM in state:
        torch.cuda.set_rng_state(torch.from_numpy(state[GPU_RANDOM].copy()))

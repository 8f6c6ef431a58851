"""Collective operations on numpy arrays through mpi4py, in the calling thread, on the MPI that Horovod has started."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# Bytes of a rank's share of one operation. On two ranks of one machine 100 MB take a quarter of the time in pieces of
# this size, which stay in the cores' caches; and MPI takes as much memory again as it adds up at once.
_SHARE = 2**20


class MpiWire:
    """See `toolkit.compression.Wire`; every rank of the communicator makes one, and the same calls on it."""

    def __init__(self, communicator: Any) -> None:
        from mpi4py import MPI

        self._communicator, self._in_place = communicator, MPI.IN_PLACE
        self.rank: int = communicator.rank
        self.size: int = communicator.size
        self._piece = min(_SHARE * self.size, 2**30)  # MPI-3 counts with 31 bits

    def sum(self, array: np.ndarray) -> None:
        """See `toolkit.compression.Wire.sum`."""
        if array.nbytes <= self._piece:
            self._communicator.Allreduce(self._in_place, array)
            return
        flat, length = array.reshape(-1), self._piece // array.itemsize
        for start in range(0, flat.size, length):
            self._communicator.Allreduce(self._in_place, flat[start : start + length])

    def summed(self, array: np.ndarray) -> np.ndarray:
        """The sum of an array over all ranks."""
        total = np.array(array)
        self.sum(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, anything that pickles, in rank order."""
        return self._communicator.allgather(value)

    def all_to_all(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_to_all`."""
        self._communicator.Alltoall(send, received)

    def all_gather(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_gather`."""
        self._communicator.Allgather(send, received)


_wires: dict[tuple[int, ...], MpiWire] = {}


def start() -> None:
    """Start MPI before Horovod does, which then leaves its end to mpi4py, so that Horovod can be started again.

    Nothing is done where Horovod is not to use MPI, or mpi4py is missing.
    """
    if os.environ.get("HOROVOD_CONTROLLER", "mpi").lower() != "mpi":
        return
    with contextlib.suppress(ImportError, RuntimeError):  # none, or no MPI library for it
        import mpi4py

        mpi4py.rc.errors = "default"
        from mpi4py import MPI  # noqa: F401 - starts MPI, for use by several threads


def wire(hvd: Any, ranks: Sequence[int]) -> MpiWire | None:
    """The wire between these ranks of the job, this one among them; they call it together for the first time.

    Returns:
        None where Horovod does not use MPI (as under horovodrun --gloo, in an elastic job and without a launcher), or
        mpi4py is missing or of another MPI.
    """
    if "mpi4py.MPI" not in sys.modules or not (hvd.mpi_enabled() and hvd.mpi_threads_supported()):
        return None
    from mpi4py import MPI

    if (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) != (hvd.rank(), hvd.size()):
        return None
    key = tuple(ranks)
    if key not in _wires:
        group = MPI.COMM_WORLD.group.Incl(list(key))
        communicator = MPI.COMM_WORLD.Create_group(group)
        group.Free()
        communicator.Set_errhandler(MPI.ERRORS_RETURN)  # which mpi4py raises
        _wires[key] = MpiWire(communicator)
    return _wires[key]

"""MPI through mpi4py, for what joins ranks without Horovod; imported where that is used, as mpi4py starts MPI."""

from __future__ import annotations

from typing import Any

import numpy as np


class MpiWire:
    """See `toolkit.compression.Wire`; every rank of the communicator makes one, and the same calls on it."""

    def __init__(self, communicator: Any = None):
        """`communicator`: mpi4py's; None: all ranks of the job."""
        from mpi4py import MPI

        self._in_place = MPI.IN_PLACE
        self._communicator = MPI.COMM_WORLD if communicator is None else communicator
        self.rank: int = self._communicator.Get_rank()
        self.size: int = self._communicator.Get_size()

    def sum(self, array: np.ndarray) -> None:
        """See `toolkit.compression.Wire.sum`."""
        self._communicator.Allreduce(self._in_place, array)

    def all_to_all(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_to_all`."""
        self._communicator.Alltoall(send, received)

    def all_gather(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_gather`."""
        self._communicator.Allgather(send, received)

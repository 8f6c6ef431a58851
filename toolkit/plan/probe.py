"""One rank of a measurement of links: `mpirun -np 2 python -m toolkit.plan.probe torch 2`.

A message's seconds from one worker to another and what `toolkit.doctor.all_reduce` measures, by MPI itself where mpi4py
is there; then the latter by Horovod: the two reducers of the recipes.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]  # a recipe does not look for modules in its working directory

import statistics
import time
from typing import Any

import numpy as np

from toolkit.doctor import all_reduce

_MESSAGES = 50


def latency(communicator: Any) -> float:
    """Seconds of a message of 8 bytes from rank 0 to rank 1: half of there and back, the median."""
    rank, found = communicator.Get_rank(), []
    data = np.zeros(1)
    for _ in range(_MESSAGES if rank < 2 else 0):
        began = time.perf_counter()
        if rank == 0:
            communicator.Send(data, 1)
            communicator.Recv(data, 1)
        else:
            communicator.Recv(data, 0)
            communicator.Send(data, 0)
        found.append(time.perf_counter() - began)
    return statistics.median(found) / 2 if found else 0.0


def by_mpi() -> dict[str, Any]:
    """`mpi`: what MPI's own all-reduce takes; `message`: seconds, between ranks. Nothing where mpi4py is missing."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # RuntimeError: it finds no MPI library
        return {}
    world = MPI.COMM_WORLD

    def reduce(data: np.ndarray, _: str) -> np.ndarray:
        total = data.copy()
        world.Allreduce(MPI.IN_PLACE, total)
        return total

    found = {"mpi": all_reduce.measure(reduce, world.Get_rank(), world.Get_size())}
    return found | ({"message": latency(world)} if world.Get_size() > 1 else {})


if __name__ == "__main__":
    sys.exit(all_reduce.main(sys.argv[1], int(sys.argv[2]), before=by_mpi))

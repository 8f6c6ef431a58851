"""Average gradients by each scheme on ranks of MPI, and write what came of it: compression_cases.py DIRECTORY."""

import sys
from pathlib import Path

import numpy as np

from toolkit import compression

SCHEMES = ["none", "fp16", "bf16", "int8", "topk", "topk:0.1", "powersgd", "powersgd:1"]
SHAPES = [(401, 301), (17,), (0, 3), (20, 10, 5, 5), (), (1000,)]  # large enough for several of MPI's algorithms
STEPS, BROKEN = 4, 2


def gradients(rank):
    """float32, (STEPS, n): a rank's. One step has a NaN on rank 1."""
    n = sum(int(np.prod(shape)) for shape in SHAPES)
    given = np.random.default_rng(rank).normal(size=(STEPS, n)).astype(np.float32)
    if rank == 1:
        given[BROKEN, 1234] = np.nan
    return given


def average_all(wire):
    """By scheme, the means of all steps, and the state after them as one array."""
    results = {}
    for name in SCHEMES:
        compressor = compression.make(name, SHAPES)
        given = gradients(wire.rank)
        for flat in given:
            compressor.average(flat, wire)
        results[name] = given
        results[f"{name} state"] = np.concatenate([np.zeros(0, np.float32), *compressor.state().values()])
    return results


if __name__ == "__main__":
    from mpi4py import MPI

    from toolkit.adapters._mpi import MpiWire

    mpi = MpiWire(MPI.COMM_WORLD)
    np.savez(Path(sys.argv[1]) / f"{mpi.size}-{mpi.rank}.npz", **average_all(mpi))

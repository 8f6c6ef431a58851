"""What a scheme costs, in time and bytes; `hvdkit plan` tells from that on which links it pays."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.compression import make


@dataclass(frozen=True)
class Cost:
    """Of one scheme, a step and rank.

    Attributes:
        name: the scheme's.
        seconds: of arithmetic, with nothing on a wire.
        bytes_sent: to other ranks.
    """

    name: str
    seconds: float
    bytes_sent: int


class _Mirror:
    """A wire to ranks that hold what this one holds; costs no more than copying it."""

    def __init__(self, size: int):
        self.rank, self.size = 0, size

    def sum(self, array: np.ndarray) -> None:
        np.multiply(array, self.size, out=array)

    def all_to_all(self, send: np.ndarray, received: np.ndarray) -> None:
        received[...] = send

    def all_gather(self, send: np.ndarray, received: np.ndarray) -> None:
        received[...] = send


def measure(names: Sequence[str], shapes: Sequence[Sequence[int]], size: int, repetitions: int = 5) -> list[Cost]:
    """Each scheme's cost on this machine, in one thread besides what numpy's BLAS uses; the schemes take turns.

    Args:
        names: as `compression.make` takes them.
        shapes: of the gradients.
        size: number of ranks, ≥ 1. All but this one are imitated.
        repetitions: steps after a first one, of which the median counts, ≥ 1.

    Raises:
        UsageError: a name is wrong.
    """
    compressors = [make(name, shapes) for name in names]
    wire = _Mirror(size)
    given = np.random.default_rng(0).standard_normal(sum(math.prod(shape) for shape in shapes), np.float32)
    flat = np.empty_like(given)
    seconds: list[list[float]] = [[] for _ in names]
    for repetition in range(1 + repetitions):
        for compressor, taken in zip(compressors, seconds, strict=True):
            np.copyto(flat, given)
            began = time.perf_counter()
            compressor.average(flat, wire)
            if repetition:  # the first one makes the buffers
                taken.append(time.perf_counter() - began)
    return [
        Cost(name, statistics.median(taken), compressor.bytes_per_step(size))
        for name, compressor, taken in zip(names, compressors, seconds, strict=True)
    ]

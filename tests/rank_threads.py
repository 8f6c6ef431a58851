"""Ranks as threads of one process, joined by a real exchange of their arrays: for code that needs only a `Wire`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SECONDS = 120  # after which a rank that the others wait for counts as lost


class Ranks:
    """The shared side: what each rank has put down for the others, and the barrier before they look."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.put: list[Any] = [None] * size
        self.bytes_sent = [0] * size  # to other ranks, a sum counted as a ring all-reduce's

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """What `work(wire)` returns on each rank, in rank order; the first exception of a rank is raised."""
        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(self._one, work, rank) for rank in range(self.size)]
        errors = [error for error in (future.exception() for future in futures) if error]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def _one(self, work: Callable[[Any], Any], rank: int) -> Any:
        try:
            return work(ThreadWire(self, rank))
        except BaseException:
            self.barrier.abort()
            raise


class ThreadWire:
    """One rank's end; see `toolkit.compression.Wire`."""

    def __init__(self, ranks: Ranks, rank: int):
        self.ranks, self.rank, self.size = ranks, rank, ranks.size

    def _exchange(self, array: np.ndarray, take: Callable[[list[np.ndarray]], Any]) -> Any:
        assert array.flags.c_contiguous
        self.ranks.put[self.rank] = array
        self.ranks.barrier.wait()
        alike = {(a.dtype, a.shape) for a in self.ranks.put}
        assert len(alike) == 1, f"ranks differ in what they send: {alike}"
        taken = take(self.ranks.put)
        self.ranks.barrier.wait()  # nobody changes what others still read
        return taken

    def sum(self, array: np.ndarray) -> None:
        assert array.dtype in (np.float32, np.float64)
        total = self._exchange(array, lambda arrays: np.add.reduce(arrays))
        self.ranks.bytes_sent[self.rank] += 2 * (self.size - 1) * array.itemsize * -(-array.size // self.size)
        array[...] = total

    def all_to_all(self, send: np.ndarray, received: np.ndarray) -> None:
        assert send.shape == received.shape and len(send) == self.size and not np.shares_memory(send, received)
        rows = self._exchange(send, lambda arrays: np.stack([array[self.rank] for array in arrays]))
        self.ranks.bytes_sent[self.rank] += (self.size - 1) * send[0].nbytes
        received[...] = rows

    def all_gather(self, send: np.ndarray, received: np.ndarray) -> None:
        assert received.shape == (self.size, *send.shape) and not np.shares_memory(send, received)
        rows = self._exchange(send, lambda arrays: np.stack(arrays))
        self.ranks.bytes_sent[self.rank] += (self.size - 1) * send.nbytes
        received[...] = rows

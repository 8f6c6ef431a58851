"""Cuts batches out of arrays by index: in bulk, and ahead of training, in a thread, where that takes long.

What is made of the cuts, such as tensors on a GPU, is made in the same place. Who cuts changes neither the batches nor
their order, so a run may be read in one way and resumed in another.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np

from toolkit.errors import UsageError
from toolkit.sharding import Part

_SLOW = 0.0002  # seconds of a batch from which on a thread makes it: handing it over takes up to 0.05 ms
_SLOW_CUTS = 2  # in a row, that it is no other process's turn on the core
_AHEAD = 2  # batches that are cut and wait, at most
_LAST_CUT = 5.0  # seconds that the end of a loop waits for the thread, where its disk does not answer
_FROM_DISK = 4e9  # bytes a second; a cut from memory is faster
_RECYCLED = 4 << 20  # bytes of a cut from which on its memory is used again: the kernel clears what is new
Cuts: TypeAlias = Generator[tuple[Part, Any, Any], None, None]
Make: TypeAlias = Callable[[Part, Any, Any], tuple[Any, Any]]
_alone = [np.empty(0)]
_ALONE = sys.getrefcount(_alone[0])  # of an array that nothing holds but a list


class Rows:
    """An array's rows, by index.

    Args:
        array: first axis the sample. What is no numpy array, or not laid out row by row, is asked for
            `array[indices]`.

    Attributes:
        in_bulk: one pass over the memory copies the rows, without Python's lock.
        mapped_bytes: of a row that lies in a mapped file; 0 for one in memory.
    """

    def __init__(self, array: Any) -> None:
        self.in_bulk = (
            type(array) in (np.ndarray, np.memmap)
            and array.ndim > 0
            and array.flags.c_contiguous
            and array.flags.aligned
            and array.dtype.isnative
            and not array.dtype.hasobject
        )
        self._array = np.asarray(array) if self.in_bulk else array  # a memmap's own methods take microseconds
        self._map, self._begin = _mapping(self._array) if self.in_bulk else (None, 0)
        self._row_bytes = self._array.nbytes // max(1, len(self._array)) if self.in_bulk else 0
        self.mapped_bytes = self._row_bytes if self._map else 0
        self._used: list[np.ndarray] = []

    def cut(self, indices: np.ndarray) -> Any:
        """A copy of the rows of these indices, int64 of shape (n,), in this order: `array[indices]`."""
        return self._array.take(indices, 0) if self.in_bulk else self._array[indices]

    def cut_again(self, indices: np.ndarray) -> Any:
        """The same, large ones into the memory of an earlier one that nothing uses any more; from one thread."""
        rows = len(indices)
        large = self.in_bulk and rows * self._row_bytes >= _RECYCLED
        if not large or indices.min() < 0 or indices.max() >= len(self._array):
            return self.cut(indices)
        into = self._unused(rows)[:rows]
        return self._array.take(indices, 0, out=into, mode="clip")  # "raise" would copy twice

    def announce(self, indices: np.ndarray) -> None:
        """Have the kernel read these rows of a mapped file at the same time, not one when the other is there."""
        if self._map is None:
            return
        begins = self._begin + np.sort(indices) * self._row_bytes
        ends = begins + self._row_bytes
        begins -= begins % mmap.PAGESIZE
        apart = begins[1:] > ends[:-1]
        begins, ends = begins[np.append(True, apart)], ends[np.append(apart, True)]
        with contextlib.suppress(OSError):  # it is a wish
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def _unused(self, rows: int) -> np.ndarray:
        """An array of at least so many rows; views, and tensors that share the memory, hold theirs."""
        for i in range(len(self._used)):
            if sys.getrefcount(self._used[i]) == _ALONE:
                if len(self._used[i]) < rows:
                    self._used[i] = self._empty(rows)
                return self._used[i]
        new = self._empty(rows)
        if len(self._used) <= _AHEAD + 1:  # a loop that keeps its batches needs new ones
            self._used.append(new)
        return new

    def _empty(self, rows: int) -> np.ndarray:
        return np.empty((rows, *self._array.shape[1:]), self._array.dtype)


def as_cut(part: Part, x: Any, y: Any) -> tuple[Any, Any]:
    """The rows as they are."""
    return x, y


def read(x: Any, y: Any, parts: Iterable[Part], samples: int, make: Make = as_cut) -> Cuts:
    """Each part with its rows of x and y, in order, as a generator: close it where it is not taken to its end.

    Numpy's arrays must not be changed meanwhile, as their rows may be cut ahead: up to two batches, by a thread that
    begins when cuts take longer than handing them over, and ends with the generator.

    Args:
        x: inputs; see `Rows`.
        y: targets; see `Rows`.
        parts: this rank's passes.
        samples: the run's.
        make: what to hand on in the place of a part's rows of x and y; may be called in the thread.

    Raises:
        UsageError: x or y has fewer rows.
    """
    for name, array in (("x", x), ("y", y)):
        if hasattr(array, "__len__") and len(array) < samples:
            raise UsageError(f"the data has {len(array)} rows in {name} and the run {samples}: give Run(…) its length.")
    return _read(Rows(x), Rows(y), iter(parts), make)


def _read(x: Rows, y: Rows, parts: Iterator[Part], make: Make) -> Cuts:
    slow_cuts = 0
    for part in parts:
        began = time.perf_counter()
        rows = make(part, x.cut_again(part.indices), y.cut_again(part.indices))
        slow_cuts = slow_cuts + 1 if time.perf_counter() - began > _SLOW else 0
        yield part, *rows
        del rows  # so that its memory can be used again
        if slow_cuts == _SLOW_CUTS and x.in_bulk and y.in_bulk:
            break
    else:
        return
    reader = _Reader(x, y, parts, make)
    try:
        yield from reader.batches()
    finally:
        reader.end()


class _Reader(threading.Thread):
    """Cuts as many batches as it is asked for, in order."""

    def __init__(self, x: Rows, y: Rows, parts: Iterator[Part], make: Make) -> None:
        super().__init__(name="hvdkit-reader", daemon=True)
        self._x, self._y, self._parts, self._make = x, y, parts, make
        self._over = False
        # Queues in C: those of `queue.Queue` and futures take some 20 microseconds more a batch.
        self._asked: SimpleQueue[None] = SimpleQueue()
        self._cut: SimpleQueue[tuple[Part, Any, Any] | BaseException | None] = SimpleQueue()
        self.start()

    def batches(self) -> Iterator[tuple[Part, Any, Any]]:
        """What the thread has cut; what it raised, in the place of the batch that raised it."""
        for _ in range(_AHEAD):
            self._asked.put(None)
        while (batch := self._cut.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            self._asked.put(None)
            yield batch
            del batch

    def end(self) -> None:
        """End the thread, after the cut that it makes; one that waits for a disk too long is left to itself."""
        self._over = True
        self._asked.put(None)
        self.join(_LAST_CUT)

    def run(self) -> None:
        """Until the last part, an error or `end`."""
        x, y, from_disk = self._x, self._y, True  # so it mostly is where cuts begin to be slow
        try:
            for part in self._parts:
                self._asked.get()
                if self._over:
                    return
                began = time.perf_counter()
                if from_disk:
                    x.announce(part.indices)
                    y.announce(part.indices)
                rows = x.cut_again(part.indices), y.cut_again(part.indices)
                seconds = time.perf_counter() - began
                self._cut.put((part, *self._make(part, *rows)))
                del rows  # so that its memory can be used again
                from_disk = len(part.indices) * (x.mapped_bytes + y.mapped_bytes) < seconds * _FROM_DISK
            self._cut.put(None)
        except BaseException as error:  # the loop's, in its place
            self._cut.put(error)


def _mapping(array: np.ndarray) -> tuple[mmap.mmap | None, int]:
    """The mapped file that an array lies in, and where it begins there, in bytes; (None, 0): it is in memory."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap):
        return None, 0
    return base, array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data

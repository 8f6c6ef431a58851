"""What all schemes share: the wire between ranks, the flat array's checks, the state, and plain averaging."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from toolkit.errors import UsageError

BLOCK = 65536  # values worked on at a time: what several passes over them need stays in a core's cache


class Wire(Protocol):
    """What joins the ranks. Every rank makes the same calls in the same order with arrays of the same shapes."""

    rank: int
    size: int

    def sum(self, array: np.ndarray) -> None:
        """Replace `array` (float32 or float64, contiguous) by its sum over all ranks, the same bits on all."""

    def all_to_all(self, send: np.ndarray, received: np.ndarray) -> None:
        """Send row r to rank r and receive rank r's in row r; two contiguous arrays of shape (size, …)."""

    def all_gather(self, send: np.ndarray, received: np.ndarray) -> None:
        """Receive every rank's `send` in `received`, of shape (size, *send.shape); rows of it are no part of `send`."""


class Compressor(ABC):
    """Averages gradients over ranks with fewer bytes on the wire. One belongs to one optimizer on one rank.

    Attributes:
        length: gradients in the flat array.
        extra: values after them that travel as they are.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], extra: int = 0):
        """`shapes`: of the gradients, in the order in which the flat array holds them."""
        self.length = sum(math.prod(shape) for shape in shapes)
        self.extra = extra
        self._kept: dict[str, np.ndarray] = {}  # float32: what goes from step to step

    def average(self, flat: np.ndarray, wire: Wire) -> None:
        """Replace `flat` by the approximate mean over all ranks: the same bits on every rank.

        Where a gradient of any rank is not finite, or none of the scheme's range, the mean has values that are not
        finite on all ranks, and every rank's state stays as it was, so that all can leave the step out. (`none`,
        `fp16` and `bf16` have no state, and such values only where a gradient is not finite.) The means of the extra
        values are right then too.

        Args:
            flat: float32, shape (length + extra,), contiguous; all gradients of this rank, one after the other.
            wire: joins the ranks. Their number may change between calls.

        Raises:
            ValueError: `flat` is something else.
        """
        length = self.length + self.extra
        found = isinstance(flat, np.ndarray) and flat.dtype == np.float32 and flat.shape == (length,)
        if not (found and flat.flags.c_contiguous and flat.flags.writeable):
            raise ValueError(f"give a contiguous, writable float32 array of {length} values.")
        with np.errstate(all="ignore"):  # values that are not finite are the caller's to judge
            if self.length:
                self._average(flat[: self.length], flat[self.length :], wire)
            elif self.extra:
                mean(flat, wire)

    @abstractmethod
    def _average(self, flat: np.ndarray, extra: np.ndarray, wire: Wire) -> None:
        """Replace both by their means; there is at least one gradient."""

    def bytes_per_step(self, size: int) -> int:
        """Bytes that one rank of `size` sends to others a step, at most; a sum counts as a ring all-reduce."""
        return self._bytes(size) if self.length else ring_bytes(self.extra, size)

    @abstractmethod
    def _bytes(self, size: int) -> int:
        """`bytes_per_step`, where there is at least one gradient."""

    def bytes_uncompressed(self, size: int) -> int:
        """What `bytes_per_step` is with `none`."""
        return ring_bytes(self.length + self.extra, size)

    def state(self) -> dict[str, np.ndarray]:
        """Copies of what goes from step to step on this rank; float32. `memory` is each rank's own."""
        return {name: array.copy() for name, array in self._kept.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Put back what `state` gave, all or nothing; the next steps are then the same to the bit.

        Raises:
            UsageError: names, shapes or dtypes differ, as with another scheme, rank or model.
        """
        wanted = {name: (array.dtype, array.shape) for name, array in self._kept.items()}
        found = {name: (array.dtype, array.shape) for name, array in state.items()}
        if found != wanted:
            raise UsageError(
                f"the saved state of the compression has {_told(found)} where this one has {_told(wanted)}: "
                "resume with the model and the compression that it was saved with."
            )
        for name, array in self._kept.items():
            array[...] = state[name]


class Uncompressed(Compressor):
    """The exact mean, up to rounding."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], extra: int = 0):
        super().__init__([*shapes, (extra,)])  # which travel as gradients do

    def _average(self, flat: np.ndarray, extra: np.ndarray, wire: Wire) -> None:
        mean(flat, wire)

    def _bytes(self, size: int) -> int:
        return self.bytes_uncompressed(size)


def _told(state: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in sorted(state.items())) or "nothing"


def mean(array: np.ndarray, wire: Wire) -> None:
    """Replace `array` by its mean over all ranks."""
    wire.sum(array)
    np.divide(array, wire.size, out=array)


def ring_bytes(length: int, size: int) -> int:
    """Bytes that a rank sends in a ring all-reduce of `length` float32: 2·(size − 1) pieces, of the longest one's size.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    return 2 * (size - 1) * 4 * -(-length // size)


def blocks(length: int) -> Iterator[slice]:
    """0 … length in slices of at most `BLOCK`."""
    for start in range(0, length, BLOCK):
        yield slice(start, min(start + BLOCK, length))


def add_memory(flat: np.ndarray, memory: np.ndarray) -> bool:
    """flat += memory; whether the result is finite everywhere."""
    total = 0.0
    for block in blocks(len(flat)):
        values = flat[block]
        np.add(values, memory[block], out=values)
        total += float(values.sum())  # not finite where any value is not; looking at each takes longer
    return math.isfinite(total) or bool(np.isfinite(flat).all())


def all_finite(array: np.ndarray) -> bool:
    """Whether every value is finite."""
    return math.isfinite(array.sum()) or bool(np.isfinite(array).all())


def offsets(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Where in the flat array each tensor begins, and where the last one ends."""
    places = [0]
    for shape in shapes:
        places.append(places[-1] + math.prod(shape))
    return places

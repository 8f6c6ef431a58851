"""Gradients in 16 or 8 bits: cut in as many parts as there are ranks, sent to the part's owner, summed in float32,
divided, encoded again and gathered.

So a rank sends 2·(size − 1)/size of the encoded gradients, as a ring all-reduce would, nothing is ever summed in
16 or 8 bits, and a value is rounded twice, whatever the number of ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from toolkit.compression import sixteen
from toolkit.compression.common import BLOCK, Compressor, Wire, blocks, offsets

_TINY = np.float32(1e-36)  # a largest value below it counts as zero: 127 divided by it nears float32's end


class _Quantised(Compressor):
    """The exchange; what the bytes mean is said by the methods that a subclass gives."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], extra: int = 0):
        super().__init__(shapes, extra)
        self._work = np.empty(min(BLOCK, self.length), np.float32)
        self._parts: list[slice] = []  # by rank, for as many ranks as the latest call had
        self._send = self._received = np.empty((0, 0), np.uint8)  # a part's row for each rank

    def _average(self, flat: np.ndarray, extra: np.ndarray, wire: Wire) -> None:
        if len(self._parts) != wire.size:
            self._lay_out(wire.size)
        own = self._parts[wire.rank]
        for rank in range(wire.size):
            if rank != wire.rank:
                self._encode(flat, rank, self._send[rank])
        self._extra_of(self._send)[:] = extra
        wire.all_to_all(self._send, self._received)
        extra[:] = np.add.reduce(self._extra_of(self._received)) / np.float32(wire.size)
        self._begin_sum(flat, own)
        for rank in range(wire.size):
            if rank != wire.rank:
                self._add(self._received[rank], flat, wire.rank)
        np.divide(flat[own], wire.size, out=flat[own])
        self._encode_mean(flat, wire.rank, self._send[wire.rank])
        wire.all_gather(self._send[wire.rank], self._received)
        self._finish(flat, wire)

    def _lay_out(self, size: int) -> None:
        self._parts = [self._part(rank, size) for rank in range(size)]
        self._send = np.zeros((size, self._row_bytes(size) + 4 * self.extra), np.uint8)
        self._received = np.zeros_like(self._send)

    def _extra_of(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, rows.shape[1] - 4 * self.extra :].view(np.float32)

    def _part(self, rank: int, size: int) -> slice:
        """What `rank` sums; all but the last ones are equally long."""
        length = -(-self.length // size)
        return slice(min(rank * length, self.length), min((rank + 1) * length, self.length))

    def _bytes(self, size: int) -> int:
        """2·(size − 1) encoded parts, of the longest one's bytes; the extra values with each."""
        return 2 * (size - 1) * (self._row_bytes(size) + 4 * self.extra)

    @abstractmethod
    def _row_bytes(self, size: int) -> int:
        """Of the longest encoded part."""

    @abstractmethod
    def _encode(self, flat: np.ndarray, rank: int, row: np.ndarray) -> None:
        """Write `rank`'s part of this rank's gradients into `row`."""

    def _begin_sum(self, flat: np.ndarray, own: slice) -> None:
        """Make this rank's own part what the others' are added to; it was not encoded."""

    @abstractmethod
    def _add(self, row: np.ndarray, flat: np.ndarray, rank: int) -> None:
        """Add what `row` holds to `rank`'s part."""

    def _encode_mean(self, flat: np.ndarray, rank: int, row: np.ndarray) -> None:
        """Write `rank`'s part of the mean into `row`."""
        self._encode(flat, rank, row)

    @abstractmethod
    def _finish(self, flat: np.ndarray, wire: Wire) -> None:
        """Replace `flat` by the mean that was received."""


class _Sixteen(_Quantised):
    def __init__(self, shapes: Sequence[tuple[int, ...]], extra: int, codec: sixteen.Fp16 | sixteen.Bf16):
        super().__init__(shapes, extra)
        self._codec = codec

    def _row_bytes(self, size: int) -> int:
        return 2 * -(-self.length // size)

    def _encode(self, flat: np.ndarray, rank: int, row: np.ndarray) -> None:
        values = flat[self._parts[rank]]
        codes = row[: 2 * len(values)].view(np.uint16)
        for block in blocks(len(values)):
            self._codec.encode(values[block], codes[block])

    def _add(self, row: np.ndarray, flat: np.ndarray, rank: int) -> None:
        values = flat[self._parts[rank]]
        codes = row[: 2 * len(values)].view(np.uint16)
        for block in blocks(len(values)):
            there = values[block]
            decoded = self._work[: len(there)]
            self._codec.decode(codes[block], decoded)
            np.add(there, decoded, out=there)

    def _finish(self, flat: np.ndarray, wire: Wire) -> None:
        for part, row in zip(self._parts, self._received, strict=True):
            values = flat[part]
            codes = row[: 2 * len(values)].view(np.uint16)
            for block in blocks(len(values)):
                self._codec.decode(codes[block], values[block])


class Fp16(_Sixteen):
    """IEEE half precision. What is beyond 65,504 becomes infinite, below 3e-8 zero."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], extra: int = 0):
        super().__init__(shapes, extra, sixteen.Fp16())


class Bf16(_Sixteen):
    """bfloat16: float32's range with 8 bits of precision."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], extra: int = 0):
        super().__init__(shapes, extra, sixteen.Bf16())


class Int8(_Quantised):
    """Whole numbers of −127 … 127 times a step: 1/127 of the largest magnitude in the tensor, or in that piece of it
    that one rank sums. The steps, float32, travel in the same message.

    What rounding takes away goes into the next step (error feedback): a rank keeps what its own encoding lost, and a
    part's owner `size` times what the mean's lost. Without that, a value that stays under half a step, such as the
    weight of a small or rare feature beside others, would never be learnt;
    `tests/single/test_compression_convergence.py` has a case. It takes a third more of time.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], extra: int = 0):
        super().__init__(shapes, extra)
        self._kept["memory"] = np.zeros(self.length, np.float32)
        self._bounds = np.unique(offsets(shapes))
        self._pieces: list[list[slice]] = []  # by rank

    def _lay_out(self, size: int) -> None:
        super()._lay_out(size)
        self._pieces = [self._cut(part) for part in self._parts]

    def _cut(self, part: slice) -> list[slice]:
        """Where in the flat array the tensors' pieces in a part are; none is empty."""
        inside = self._bounds[(self._bounds > part.start) & (self._bounds < part.stop)]
        bounds = [part.start, *inside.tolist(), part.stop] if part.stop > part.start else []
        return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]

    def _row_bytes(self, size: int) -> int:
        """A byte a value, up to a multiple of 4, and the steps, as many as the part of most pieces has."""
        return self._code_bytes(size) + 4 * max(len(self._cut(self._part(rank, size))) for rank in range(size))

    def _code_bytes(self, size: int) -> int:
        return 4 * -(-self.length // (4 * size))

    def _steps(self, rows: np.ndarray) -> np.ndarray:
        return rows[..., self._code_bytes(len(self._parts)) : rows.shape[-1] - 4 * self.extra].view(np.float32)

    def _encode(self, flat: np.ndarray, rank: int, row: np.ndarray) -> None:
        self._write(flat, rank, row, self._kept["memory"])

    def _encode_mean(self, flat: np.ndarray, rank: int, row: np.ndarray) -> None:
        self._write(flat, rank, row, None)

    def _write(self, flat: np.ndarray, rank: int, row: np.ndarray, memory: np.ndarray | None) -> None:
        """Add the memory, write a part into `row`, and leave in `flat` what that lost."""
        codes, steps, start = row.view(np.int8), self._steps(row), self._parts[rank].start
        for i, piece in enumerate(self._pieces[rank]):
            values = flat[piece]
            largest = np.float32(0)
            for block in blocks(len(values)):
                there = values[block]
                if memory is not None:
                    np.add(there, memory[piece][block], out=there)
                largest = np.maximum(largest, np.maximum(there.max(), -there.min()))  # NaN stays NaN
            steps[i] = self._write_piece(values, largest, codes[piece.start - start : piece.stop - start])

    def _write_piece(self, values: np.ndarray, largest: np.float32, codes: np.ndarray) -> np.float32:
        """Encode one piece; its step."""
        if not _TINY <= largest < np.inf:
            codes.fill(0)
            return np.float32(0 if largest < _TINY else np.nan)
        step, inverse = largest / np.float32(127), np.float32(127) / largest
        for block in blocks(len(values)):
            there = values[block]
            whole = self._work[: len(there)]
            np.multiply(there, inverse, out=whole)
            np.rint(whole, out=whole)
            np.copyto(codes[block], whole, casting="unsafe")
            np.multiply(whole, step, out=whole)
            np.subtract(there, whole, out=there)
        return step

    def _begin_sum(self, flat: np.ndarray, own: slice) -> None:
        np.add(flat[own], self._kept["memory"][own], out=flat[own])

    def _add(self, row: np.ndarray, flat: np.ndarray, rank: int) -> None:
        for place, decoded in self._decoded(row, rank):
            np.add(flat[place], decoded, out=flat[place])

    def _finish(self, flat: np.ndarray, wire: Wire) -> None:
        # A gradient that is not finite made its step so, thereby the mean and the mean's step, which all ranks see.
        if not np.isfinite(self._steps(self._received)).all():
            flat.fill(np.nan)
            return
        memory, own = self._kept["memory"], self._parts[wire.rank]
        np.multiply(flat[own], wire.size, out=flat[own])
        for rank, row in enumerate(self._received):
            for place, decoded in self._decoded(row, rank):
                np.copyto(memory[place], flat[place])
                np.copyto(flat[place], decoded)

    def _decoded(self, row: np.ndarray, rank: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Block by block of `rank`'s part: its place in the flat array, and what `row` holds for it."""
        codes, steps, first = row.view(np.int8), self._steps(row), self._parts[rank].start
        for piece, step in zip(self._pieces[rank], steps, strict=False):
            for block in blocks(piece.stop - piece.start):
                place = slice(piece.start + block.start, piece.start + block.stop)
                decoded = self._work[: place.stop - place.start]
                np.copyto(decoded, codes[place.start - first : place.stop - first])
                np.multiply(decoded, step, out=decoded)
                yield place, decoded

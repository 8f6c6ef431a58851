"""Gradients of matrices as products of two thin ones, found by one step of power iteration across the ranks.

Source: Vogels, Karimireddy, Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", arXiv:1905.13727, algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.compression.common import BLOCK, Compressor, Wire, add_memory, all_finite, mean, offsets, ring_bytes

DEFAULT_RANK = 4
_ALONE = 1 << 18  # multiplications up to which OpenBLAS takes one thread (its SMP_THRESHOLD_MIN and its factor of 4)


@dataclass(frozen=True)
class _Matrix:
    """A gradient taken as a matrix, and where its places are in the flat array and in the two sums."""

    rows: int
    columns: int
    flat: slice
    left: slice
    right: slice


class PowerSGD(Compressor):
    """Rank-r approximation with error feedback and a warm start.

    A gradient M of more than one dimension is a matrix of its first dimensions by its last ones, cut where both
    numbers are closest: so kernels of (out, in, height, width) and of (height, width, in, out) are alike. With Q from
    the step before, P = mean(M·Q) is made orthonormal, Q = mean(Mᵀ·P), and the mean gradient is about P·Qᵀ. Vectors,
    and matrices that have no more values than P and Q, travel as they are, with P. What P·Qᵀ lacks of a rank's own
    gradient is added to that of the next step.

    What every rank must hold to the same bit is computed by additions and multiplications of its own, not by BLAS,
    whose results depend on processor and threads. BLAS is given so little at a time that it takes no threads of its
    own: these wait busily, and two workers on two cores took 90 ms for 3.2 million gradients, in place of 15.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], rank: int = DEFAULT_RANK, extra: int = 0):
        """`rank`: r, at least 1."""
        super().__init__(shapes, extra)
        self.rank = rank
        self._matrices: list[_Matrix] = []
        self._exact: list[slice] = []  # where in the flat array what travels as it is lies
        left = right = 0
        for shape, start in zip(shapes, offsets(shapes), strict=False):
            rows, columns = _as_matrix(shape)
            there = slice(start, start + rows * columns)
            if rank * (rows + columns) < rows * columns:
                places = slice(left, left + rank * rows), slice(right, right + rank * columns)
                self._matrices.append(_Matrix(rows, columns, there, *places))
                left, right = places[0].stop, places[1].stop
            elif self._exact and self._exact[-1].stop == start:
                self._exact[-1] = slice(self._exact[-1].start, there.stop)
            else:
                self._exact.append(there)
        exact = sum(place.stop - place.start for place in self._exact)
        self._first = np.zeros(left + exact + extra, np.float32)  # every P, what travels as it is, and the extra values
        self._second = np.zeros(right, np.float32)  # every Qᵀ
        # RandomState, because numpy promises its stream for good.
        self._seeded = np.random.RandomState(0).standard_normal(right).astype(np.float32)
        self._kept = {"memory": np.zeros(self.length, np.float32), "q": self._seeded.copy()}

    def _average(self, flat: np.ndarray, extra: np.ndarray, wire: Wire) -> None:
        end = len(self._first) - self.extra
        if add_memory(flat, self._kept["memory"]):
            self._fill_first(flat)
        else:
            self._first[:end] = np.nan
        self._first[end:] = extra
        mean(self._first, wire)
        extra[:] = self._first[end:]
        if not all_finite(self._first[:end]):
            flat.fill(np.nan)
            return
        for matrix in self._matrices:
            p = self._first[matrix.left].reshape(matrix.rows, self.rank)
            _make_orthonormal(p)
            values = flat[matrix.flat].reshape(matrix.rows, matrix.columns)
            second = self._second[matrix.right].reshape(self.rank, matrix.columns)
            second.fill(0)
            for some in _some_rows(values, self.rank):
                second += np.matmul(p[some].T, values[some])
        if self._matrices:
            mean(self._second, wire)
        if not all_finite(self._second):
            flat.fill(np.nan)
            return
        self._finish(flat)

    def _fill_first(self, flat: np.ndarray) -> None:
        for matrix in self._matrices:
            values = flat[matrix.flat].reshape(matrix.rows, matrix.columns)
            q = self._kept["q"][matrix.right].reshape(self.rank, matrix.columns)
            p = self._first[matrix.left].reshape(matrix.rows, self.rank)
            for some in _some_rows(values, self.rank):
                np.matmul(values[some], q.T, out=p[some])
        end = len(self._first) - self.extra
        for place in reversed(self._exact):
            start = end - (place.stop - place.start)
            self._first[start:end] = flat[place]
            end = start

    def _finish(self, flat: np.ndarray) -> None:
        """Put the mean in `flat`, what it lacks of this rank's own in the memory, and Q by for the next step."""
        memory, kept_q = self._kept["memory"], self._kept["q"]
        for matrix in self._matrices:
            shape = matrix.rows, matrix.columns
            p = self._first[matrix.left].reshape(matrix.rows, self.rank)
            q = self._second[matrix.right].reshape(self.rank, matrix.columns)
            _replace_by_product(flat[matrix.flat].reshape(shape), memory[matrix.flat].reshape(shape), p, q)
            _normalise(q, self._seeded[matrix.right].reshape(q.shape), kept_q[matrix.right].reshape(q.shape))
        end = len(self._first) - self.extra
        for place in reversed(self._exact):
            start = end - (place.stop - place.start)
            flat[place] = self._first[start:end]
            end = start

    def _bytes(self, size: int) -> int:
        """Two sums."""
        return ring_bytes(len(self._first), size) + ring_bytes(len(self._second), size)


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: the leading dimensions by the others, cut where their sum is smallest."""
    cuts = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(cuts, key=sum) if cuts else (math.prod(shape), 1)


def _some_rows(values: np.ndarray, rank: int) -> Iterator[slice]:
    """All rows, so many at a time that a product with `rank` vectors takes one thread."""
    rows = max(1, _ALONE // (values.shape[1] * rank))
    for start in range(0, len(values), rows):
        yield slice(start, start + rows)


def _make_orthonormal(p: np.ndarray) -> None:
    """Orthonormal columns in place (Gram-Schmidt in float64); one that the others before it span becomes 0."""
    columns = np.array(p.T, np.float64, order="C")
    for i, column in enumerate(columns):
        before = math.sqrt(np.add.reduce(column * column))
        for other in columns[:i]:
            column -= np.add.reduce(column * other) * other
        norm = math.sqrt(np.add.reduce(column * column))
        column *= 1 / norm if norm > 1e-7 * before else 0.0
    p[...] = columns.T


def _replace_by_product(values: np.ndarray, lost: np.ndarray, p: np.ndarray, q: np.ndarray) -> None:
    """values = p·q, and lost = values before that − p·q, some rows at a time."""
    rows = max(1, BLOCK // values.shape[1])
    product, term = np.empty((2, rows, values.shape[1]), np.float32)
    for start in range(0, len(values), rows):
        there, its_p = values[start : start + rows], p[start : start + rows]
        total, work = product[: len(there)], term[: len(there)]
        np.multiply(its_p[:, :1], q[0], out=total)
        for j in range(1, len(q)):
            np.multiply(its_p[:, j : j + 1], q[j], out=work)
            np.add(total, work, out=total)
        np.subtract(there, total, out=lost[start : start + rows])
        np.copyto(there, total)


def _normalise(q: np.ndarray, seeded: np.ndarray, result: np.ndarray) -> None:
    """Rows of length 1, which keeps small gradients' products in range; a row of 0 is begun anew."""
    for row, fresh, kept in zip(q, seeded, result, strict=True):
        norm = math.sqrt(np.add.reduce(np.square(row, dtype=np.float64)))
        kept[...] = np.divide(row, norm, dtype=np.float64) if norm > 0 else fresh

"""Only the gradients of largest magnitude travel; the rest waits and is added to the next step's (error feedback).

Sources: Stich, Cordonnier, Jaggi 2018, "Sparsified SGD with Memory", arXiv:1809.07599; Lin et al. 2018, "Deep Gradient
Compression", arXiv:1712.01887, from which the sampled threshold is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from toolkit.compression.common import BLOCK, Compressor, Wire, add_memory, all_finite, blocks

DEFAULT_SHARE = 0.01
_SAMPLES = 20_000
_MARGINS = (1.25, 2.0, 8.0)  # candidates that a sample is to give, as multiples of those wanted


class TopK(Compressor):
    """Sends the k largest of the whole flat array, not of each tensor.

    Of all choices of k values that one leaves the least behind, a tensor is served as it deserves, also the smallest,
    and one selection takes less time than one a tensor. A tensor of small gradients is not forgotten: what it is owed
    grows in the memory until it is among the largest.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], share: float = DEFAULT_SHARE, extra: int = 0):
        """`share`: k as a share of all values, over 0 up to 1; at least one value is sent."""
        super().__init__(shapes, extra)
        self.k = min(self.length, max(1, round(share * self.length)))
        self._kept["memory"] = np.zeros(self.length, np.float32)
        self._send = np.zeros(2 * self.k + extra, np.uint32)  # places, and the bits of their and the extra values
        self._received = np.zeros((0, len(self._send)), np.uint32)

    def _average(self, flat: np.ndarray, extra: np.ndarray, wire: Wire) -> None:
        if len(self._received) != wire.size:
            self._received = np.zeros((wire.size, len(self._send)), np.uint32)
        places, values = self._send[: self.k], self._send[self.k : 2 * self.k].view(np.float32)
        self._send[2 * self.k :] = extra.view(np.uint32)
        if add_memory(flat, self._kept["memory"]):
            places[:] = largest(flat, self.k)
            np.take(flat, places, out=values)
            flat[places] = 0
        else:
            values.fill(np.nan)
        wire.all_gather(self._send, self._received)
        every = self._received[:, self.k :].view(np.float32)
        np.divide(every, wire.size, out=every)
        every, extras = every[:, : self.k], every[:, self.k :]
        extra[:] = np.add.reduce(extras)
        if not all_finite(every):
            flat.fill(np.nan)
            return
        np.copyto(self._kept["memory"], flat)
        flat.fill(0)
        for its_places, its_values in zip(self._received[:, : self.k], every, strict=True):
            flat[its_places] += its_values  # a rank's places differ

    def _bytes(self, size: int) -> int:
        """To every other rank k places and values, and the extra ones, of 4 bytes each."""
        return 4 * (2 * self.k + self.extra) * (size - 1)


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """The places of the k largest magnitudes, ascending; among equal ones the first count.

    Args:
        values: float32, finite, shape (n,).
        k: 1 … n.
    """
    candidates = _candidates(values, k)
    if len(candidates) < k:  # fewer than k are not zero; the first k hold enough zeros
        zeros = np.flatnonzero(values[:k] == 0)[: k - len(candidates)]
        return np.sort(np.concatenate([candidates, zeros]))
    magnitudes = np.abs(values[candidates])
    last = np.partition(magnitudes, len(candidates) - k)[len(candidates) - k]
    chosen = magnitudes > last
    equal = np.flatnonzero(magnitudes == last)
    chosen[equal[: k - np.count_nonzero(chosen)]] = True
    return candidates[chosen]


def _candidates(values: np.ndarray, k: int) -> np.ndarray:
    """Places, ascending, among which the k largest are, all that are equal to the last of those as well.

    They are fewer than k where fewer values are not zero. A threshold guessed from a sample spares most of the work.
    """
    sample = np.abs(values[:: max(1, len(values) // _SAMPLES)])
    for margin in _MARGINS:
        rank = int(len(sample) * (1 - margin * k / len(values)))
        if rank <= 0:
            break
        threshold = np.partition(sample, rank)[rank]
        if threshold == 0:
            break
        candidates = np.concatenate(list(_over(values, threshold)))
        if len(candidates) >= k:
            return candidates
    return np.flatnonzero(values)


def _over(values: np.ndarray, threshold: np.float32) -> Iterator[np.ndarray]:
    work = np.empty(min(BLOCK, len(values)), np.float32)
    for block in blocks(len(values)):
        there = values[block]
        found = np.flatnonzero(np.abs(there, out=work[: len(there)]) >= threshold)
        yield found + block.start

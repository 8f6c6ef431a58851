"""Which samples were really used: each of an epoch's samples once, or which were missed or repeated."""

from __future__ import annotations

import numpy as np

from toolkit.adapters import Adapter
from toolkit.errors import SamplesDiffer

_SHOWN = 5  # samples that a message names


class Audit:
    """Counts what all ranks use of one epoch after another; every rank makes the same calls.

    Args:
        adapter: the adapter in use.
        samples: number of training samples.
    """

    def __init__(self, adapter: Adapter, samples: int) -> None:
        self._adapter, self._samples = adapter, samples
        self._used: list[np.ndarray] = []  # since the last count
        self._counts = np.zeros(samples, np.int64)  # of all ranks, in this epoch, alike on all ranks

    def note(self, indices: np.ndarray) -> None:
        """This rank has used these samples in the pass just done."""
        self._used.append(np.asarray(indices, np.int64))

    def counts(self) -> np.ndarray:
        """How often each sample was used in this epoch so far, by all ranks: int64, shape (samples,)."""
        used = np.concatenate([np.zeros(0, np.int64), *self._used])
        for rank, indices in enumerate(self._adapter.gather(used)):
            strange = indices[(indices < 0) | (indices >= self._samples)]
            if len(strange):
                raise SamplesDiffer(f"audit: rank {rank} used sample {strange[0]} of {self._samples} samples")
            self._counts += np.bincount(indices, minlength=self._samples)
        self._used = []
        return self._counts.copy()

    def restore(self, counts: np.ndarray) -> None:
        """Take up an epoch whose earlier part was counted before an interruption."""
        self._counts = counts.astype(np.int64)

    def end_epoch(self, epoch: int) -> str:
        """Count the epoch, and begin the next one.

        Returns:
            The line to print.

        Raises:
            SamplesDiffer: samples were missed or repeated; on every rank.
        """
        counts = self.counts()
        self._counts = np.zeros(self._samples, np.int64)
        missed, repeated = np.flatnonzero(counts == 0), np.flatnonzero(counts > 1)
        text = f"audit of epoch {epoch}: {self._samples} samples, {len(missed)} missed, {len(repeated)} repeated"
        if len(missed) == len(repeated) == 0:
            return text
        named = [_listed(what, found) for what, found in (("missed", missed), ("repeated", repeated)) if len(found)]
        raise SamplesDiffer("; ".join([text, *named]))


def _listed(what: str, indices: np.ndarray) -> str:
    more = f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else ""
    return f"{what}: {', '.join(map(str, indices[:_SHOWN]))}{more}"

"""Do all ranks hold the same model? Compared by digests, now and then, at a bounded cost."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np

from toolkit.adapters import Adapter
from toolkit.errors import RanksDiffer

_EVERY = 100  # steps between checks, where that costs less than
_SHARE = 0.01  # of the run's time; else as many more as keep to it
_SHOWN = 3  # tensors that a difference names


class SyncCheck:
    """Compares all ranks' parameters, buffers and optimizer state; every rank makes the same calls.

    Args:
        adapter: the adapter in use.
        every: steps between checks; 0: none but `compare`'s; None: 100, or as many more as keep
            the checks under 1 % of the run's time.
    """

    def __init__(self, adapter: Adapter, every: int | None) -> None:
        self._adapter, self._every = adapter, every
        self._interval = _EVERY if every is None else every
        self._compared: tuple[int, float] | None = None  # the step of the latest comparison, and when it ended
        self._latency: float | None = None  # the shortest of a sum over the ranks, in seconds

    def due(self, step: int) -> bool:
        """Whether a check is due after `step`."""
        begin = self._compared[0] if self._compared else 0
        return self._interval > 0 and step - begin >= self._interval

    def has_compared(self, step: int) -> bool:
        """Whether the latest comparison was after `step`."""
        return self._compared is not None and step == self._compared[0]

    def compare(self, model: Any, optimizer: Any, step: int) -> None:
        """Compare now.

        Raises:
            RanksDiffer: the ranks are not equal to the bit; on every rank.
        """
        began = time.perf_counter()
        digest = self._adapter.digest(model, optimizer)
        digested = time.perf_counter()
        seconds = digested - began + (self._latency or 0.0)
        last_step, last_time = self._compared or (step, began)
        per_step = (began - last_time) / (step - last_step) if step > last_step else 0.0
        # One small sum over the ranks: numbers below 2¹⁶ are all the same where their variance is exactly 0.
        whole = hashlib.blake2b("".join(f"{n}{d}" for n, d in digest.items()).encode(), digest_size=8).digest()
        numbers = np.frombuffer(whole, np.uint16).astype(np.float64)
        means = self._adapter.average(
            {"numbers": numbers, "squares": numbers**2, "seconds": seconds, "per_step": per_step}
        )
        if self._compared:  # the first sum waits for ranks that begin later
            self._latency = min(time.perf_counter() - digested, self._latency or float("inf"))
        if np.any(means["squares"] != np.square(means["numbers"])):
            raise RanksDiffer(self._difference(digest, model, optimizer, step))
        if self._every is None and per_step > 0:  # from the means, so that all ranks decide alike
            self._interval = max(_EVERY, int(means["seconds"] / (_SHARE * means["per_step"])) + 1)
        self._compared = step, time.perf_counter()

    def _difference(self, digest: dict[str, str], model: Any, optimizer: Any, step: int) -> str:
        digests = self._adapter.gather(digest)
        names = [name for name in digests[0] if any(other.get(name) != digests[0][name] for other in digests)]
        ranks = [rank for rank, other in enumerate(digests) if other != digests[0]]
        state = self._adapter.export_state(model, optimizer)
        held = self._adapter.gather({name: state[name] for name in names[:_SHOWN] if name in state})
        differences = []
        for name in names[:_SHOWN]:
            arrays = [np.asarray(rank[name], np.float64) for rank in held if name in rank]
            same_shape = len({array.shape for array in arrays}) == 1 and len(arrays) == len(held)
            largest = max(np.abs(array - arrays[0]).max(initial=0) for array in arrays) if same_shape else np.inf
            differences.append(f"{name} (by up to {largest:.3g})")
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        when = f"after step {step}" if step else "before the first step"
        cause = "is the optimizer distributed?" if step else "was the initial state broadcast?"
        ranks_text = ", ".join(map(str, ranks))
        return f"{when}, ranks {ranks_text} differ from rank 0 in {', '.join(differences)}{more}: {cause}"

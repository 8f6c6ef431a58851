"""What a run takes of its GPUs, for the rows of its epochs."""

from __future__ import annotations

import numpy as np

from toolkit.adapters import Adapter

_MEMORY, _UTILIZATION = "gpu_memory_megabytes", "gpu_utilization_percent"


class GpuUsage:
    """Notes the GPU's use now and then in an epoch; on CPUs nothing is noted, sent or told.

    Args:
        adapter: the adapter in use.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._percents: list[float] = []

    def note(self) -> None:
        """Look at this rank's GPU, while it trains."""
        percent = self._adapter.usage().get(_UTILIZATION)
        if percent is not None:
            self._percents.append(percent)

    def end_epoch(self) -> dict[str, float]:
        """What the epoch's row says; on GPUs every rank calls it.

        Returns:
            `gpu_memory_megabytes`: the most that any rank has had at a time since its start; and, where NVML tells it,
            `gpu_utilization_percent`: the mean over what the ranks noted. {} on CPUs.
        """
        usage, percents = self._adapter.usage(), self._percents
        self._percents = []
        if not usage:
            return {}
        told = self._adapter.gather((usage[_MEMORY], percents))
        noted = [percent for _, percents in told for percent in percents]
        means = {_UTILIZATION: round(float(np.mean(noted)), 1)} if noted else {}
        return {_MEMORY: max(memory for memory, _ in told), **means}

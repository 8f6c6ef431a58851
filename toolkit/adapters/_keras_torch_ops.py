"""For Keras on torch what `_tensorflow_ops` has for Keras on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from toolkit.adapters._torch_ops import (
    all_reduce_sum,
    average_gradients,
    be_deterministic,
    exchange_flag,
    export_random,
    first_broken,
    gather,
    import_random,
    leave_out,
    seed_random,
)

__all__ = [
    "GradientAverager",
    "all_reduce_sum",
    "be_deterministic",
    "exchange_flag",
    "export_random",
    "gather",
    "import_random",
    "seed_random",
    "set_threads",
]


def set_threads(threads: int) -> None:
    """Give torch this many compute threads."""
    torch.set_num_threads(threads)


class GradientAverager:
    """Averages gradients over all ranks; None counts as zero, and stays None where it is on every rank."""

    def __init__(self, name: str, compression: str):
        """`name` names the collective operations, alike on all ranks, and is used for nothing else."""
        self._name = name
        self._compression = compression

    @torch.compiler.disable  # under jit_compile=True: Horovod's operations are no part of a compiled graph
    @torch.no_grad()
    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """The mean of each gradient over all ranks."""
        parameters = [v.value for v in variables]
        return list(average_gradients(gradients, parameters, compression=self._compression, name=self._name))

    @torch.compiler.disable
    @torch.no_grad()
    def unless_broken(
        self, means: list[Any], gradients: Sequence[Any], variables: Sequence[Any], apply: Callable[[], Any]
    ) -> None:
        """Call `apply`, or note that the step is left out because a mean is not finite."""
        broken = first_broken(means, gradients, [v.path for v in variables])
        if broken is None:
            apply()
        else:
            leave_out(broken)

"""For Keras on torch what `_tensorflow_ops` has for Keras on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from toolkit.adapters import _torch_average
from toolkit.adapters._reduction import exchange_flag, leave_out
from toolkit.adapters._torch_ops import (
    all_reduce_sum,
    be_deterministic,
    broadcast,
    export_random,
    gather,
    import_random,
    seed_random,
    use_cpu,
    use_gpu,
    visible_gpus,
)

__all__ = [
    "GradientAverager",
    "all_reduce_sum",
    "be_deterministic",
    "broadcast",
    "exchange_flag",
    "export_random",
    "gather",
    "import_random",
    "seed_random",
    "set_threads",
    "use_cpu",
    "use_gpu",
    "visible_gpus",
]


def set_threads(threads: int) -> None:
    """Give torch this many compute threads."""
    torch.set_num_threads(threads)


class GradientAverager(_torch_average.GradientAverager):
    """Averages gradients over all ranks; None counts as zero, and stays None where it is on every rank."""

    @torch.compiler.disable  # under jit_compile=True: Horovod's operations are no part of a compiled graph
    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """The mean of each gradient over all ranks."""
        return super().__call__(gradients, [v.value for v in variables])

    @torch.compiler.disable
    @torch.no_grad()
    def unless_broken(
        self, means: list[Any], gradients: Sequence[Any], variables: Sequence[Any], apply: Callable[[], Any]
    ) -> None:
        """Call `apply`, or note that the step is left out because a mean is not finite."""
        if self.broken is None:
            apply()
        else:
            leave_out(variables[self.broken].path if self.broken >= 0 else "")

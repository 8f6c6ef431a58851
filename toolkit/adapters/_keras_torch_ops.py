"""For Keras on torch what `_tensorflow_ops` has for Keras on TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from keras.src.backend.torch import core

from toolkit.adapters import _torch_average, _torch_ops
from toolkit.adapters import _torch_batch_norm as batch_norm
from toolkit.adapters._reduction import exchange_flag, leave_out
from toolkit.adapters._torch_ops import (
    all_reduce_sum,
    be_deterministic,
    broadcast,
    export_random,
    gather,
    import_random,
    on_device,
    peak_memory,
    seed_random,
    set_threads,
    users_threads,
)
from toolkit.errors import UsageError

__all__ = [
    "GradientAverager",
    "all_reduce_sum",
    "batch_norm",
    "be_deterministic",
    "broadcast",
    "check_place",
    "exchange_flag",
    "export_random",
    "gather",
    "import_random",
    "on_device",
    "peak_memory",
    "seed_random",
    "set_threads",
    "use_cpu",
    "use_gpu",
    "users_threads",
    "visible_gpus",
]


def visible_gpus() -> int:
    """GPUs that Keras may take: those that torch can use, where KERAS_TORCH_DEVICE names no other device."""
    return _torch_ops.visible_gpus() if os.environ.get("KERAS_TORCH_DEVICE", "cuda").startswith("cuda") else 0


def use_gpu(number: int) -> str:
    """Have Keras and torch take this GPU; returns its name."""
    core.DEFAULT_DEVICE = "cuda"  # torch's current one; Keras looks for this very word here and there
    return _torch_ops.use_gpu(number)


def use_cpu() -> None:
    """Have Keras take the CPU: it takes a GPU of its own accord, and its `keras.device` is for a thread's block."""
    core.DEFAULT_DEVICE = "cpu"


def check_place(model: Any) -> None:
    """Raise `UsageError` for a model whose variables are on another device than this worker's."""
    here = torch.empty(0, device=core.get_device()).device
    for variable in model.variables:
        if variable.value.device != here:
            raise UsageError(
                f"{variable.path} is on {variable.value.device} and this worker computes on {here}: build the model "
                "after start()."
            )


class GradientAverager(_torch_average.GradientAverager):
    """Averages gradients over all ranks; None counts as zero, and stays None where it is on every rank."""

    @torch.compiler.disable  # under jit_compile=True: Horovod's operations are no part of a compiled graph
    def __call__(self, gradients: list[Any], variables: Sequence[Any]) -> list[Any]:
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

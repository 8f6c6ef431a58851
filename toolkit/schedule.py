"""Learning-rate scaling and warm-up: pure functions of step and batch size.

Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", arXiv:1706.02677, sections 2.1 and 2.2.
"""

from __future__ import annotations

from toolkit.errors import UsageError


def linear_scale(global_batch_size: int, reference_batch_size: int) -> float:
    """The factor for the learning rate when the batch grows from the one that the rate was tuned for."""
    if global_batch_size < 1 or reference_batch_size < 1:
        raise UsageError(f"batch sizes {global_batch_size} and {reference_batch_size}: both must be at least 1.")
    return global_batch_size / reference_batch_size


def warmup(step: int, warmup_steps: int, start_factor: float) -> float:
    """The factor for the full learning rate: from `start_factor` at step 0 linearly to 1 at `warmup_steps`.

    Args:
        step: steps taken before this one, ≥ 0.
        warmup_steps: length of the warm-up; 0 means none.
        start_factor: the factor at step 0, such as 1 / `linear_scale(…)`.
    """
    if step >= warmup_steps:
        return 1.0
    return start_factor + (1.0 - start_factor) * step / warmup_steps

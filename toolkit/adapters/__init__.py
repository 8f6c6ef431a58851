"""The contract that every adapter keeps, written once.

An adapter is a module, `toolkit.adapters.torch`, `.tensorflow` or `.keras`, with the functions of
`Adapter` below: same names, parameters and defaults. A process imports one of them; importing has
no side effect. `tests/single/test_contract.py` compares the signatures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from toolkit.world import World


class Adapter(Protocol):
    """What a recipe and the neutral modules ask of a framework."""

    def start(self, *, seed: int = 0, tune: bool = True, verbose: bool = False) -> World:
        """Tune this process, start Horovod, seed the framework; also without any launcher (size 1).

        An exception that nobody catches after this call ends the whole job: the rank and host are
        named, the exit code is not 0 (2 for a `UsageError`), the other workers do not wait.

        Args:
            seed: seeds Python's, numpy's and the framework's generators, alike on every rank.
            tune: choose thread counts and Horovod's and MPI's settings for this machine; what the
                user set in the environment is left alone.
            verbose: rank 0 prints each chosen setting with its reason.

        Raises:
            UsageError: the framework can't be used as it is set up (such as Keras on the jax backend).
        """

    def stop(self) -> None:
        """Leave the job cleanly; every rank calls it, after its last collective call. May be repeated."""

    def distribute(
        self,
        optimizer: Any,
        model: Any,
        *,
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
        compression: str = "none",
    ) -> Any:
        """The framework's own optimizer, made to apply the mean of all ranks' gradients.

        To make that mean the exact mean over a global batch of unequal parts, multiply each rank's
        mean loss with `Batch.weight` (see `toolkit.sharding`). A parameter that has a gradient on
        some ranks only counts as zero on the others; one that has none on any rank is not updated.

        Args:
            optimizer: an optimizer of this framework, not distributed before.
            model: the model whose parameters it updates; names them in messages.
            accumulation_steps: k ≥ 1; the mean over k calls' gradients is applied once in k calls.
            clip_norm: largest global L2 norm of the averaged gradients; longer ones are scaled down
                to it, after averaging and accumulation. None: no clipping.
            compression: "none", or "fp16": gradients travel as 16-bit floats.

        Returns:
            The optimizer, still an instance of its class, with the same options.

        Raises:
            UsageError: wrong type, distributed twice, not started, or an option out of range.
        """

    def broadcast_state(self, model: Any, optimizer: Any = None) -> None:
        """Give every rank rank 0's parameters, buffers and optimizer state, bit for bit.

        Optimizer state that does not exist yet on rank 0 (before its first step) is created by
        the first step on all ranks alike, and is nothing to broadcast.
        """

    def average(self, values: Mapping[str, float | np.ndarray], weight: float = 1.0) -> dict[str, float | np.ndarray]:
        """The mean of each value over all ranks, weighted by `weight`, the same on every rank.

        Args:
            values: names to numbers or float arrays; names and shapes alike on all ranks.
            weight: this rank's share, such as the number of samples behind its values; ≥ 0.

        Returns:
            Σ weightᵣ·valueᵣ / Σ weightᵣ in float64; NaN where all weights are 0. A rank of weight 0
            adds nothing, even where its value is NaN.
        """

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (anything that pickles), in rank order, on every rank."""

    def export_state(self, model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
        """Copies of the model's parameters and buffers and of the optimizer's state, by stable names.

        Returns:
            `model/<name>` and `optimizer/<name>` to arrays in the layout and dtype that the
            framework holds (bfloat16 widened to float32, which is exact); numbers as 0-d arrays.
            The names depend on the model's structure only, not on the process or its history.
        """

    def import_state(self, model: Any, optimizer: Any, state: Mapping[str, np.ndarray]) -> None:
        """Put back what `export_state` gave, all or nothing.

        Raises:
            UsageError: names, shapes or dtypes differ; the first few differences are listed, and
                neither model nor optimizer was changed.
        """

    def digest(self, model: Any, optimizer: Any = None) -> dict[str, str]:
        """A short hash of each tensor of `export_state` that all ranks must hold alike, to compare them.

        Left out is what each rank keeps for itself: BatchNorm's running statistics and random states.
        """

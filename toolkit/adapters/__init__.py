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

    def start(
        self,
        *,
        seed: int = 0,
        tune: bool = True,
        verbose: bool = False,
        deterministic: bool = False,
        groups: int = 1,
        stall_timeout: float = 300.0,
        device: str = "auto",
        share_gpus: bool = False,
    ) -> World:
        """Tune this process, start Horovod, seed the framework; also without any launcher (size 1).

        An exception that nobody catches after this call ends the whole job: the rank and host are
        named, the exit code is not 0 (2 for a `UsageError`), the other workers do not wait.

        Args:
            seed: seeds Python's, numpy's and the framework's generators, alike on every rank.
            tune: choose thread counts and Horovod's and MPI's settings for this machine; what the
                user set in the environment, or of the framework's threads in the script, is left alone.
            verbose: rank 0 prints each chosen setting with its reason.
            deterministic: let nothing that changes from run to run decide in which order numbers are
                added: the framework's deterministic operations, no fusion of reductions that happen to
                be ready together, and no trial by which "auto" takes a reducer.
            groups: train this many models at the same time: the workers are cut into so many groups of
                neighbours (Horovod process sets), and the world, all functions here and everything
                built on them are about this worker's group.
            stall_timeout: seconds after which a worker that does not come to what the others wait in, or gives
                no sign of life, ends the job and is named (see `toolkit.watch`); 0: never. Also given to
                Horovod's stall inspector, where the environment does not set it.
            device: "cpu"; "gpu": this worker's own among the GPUs of its host, by local rank; "auto": that, or the CPU
                where no worker sees a GPU, or several workers have too few or a Horovod without NCCL. `World.device`
                names it.
            share_gpus: let workers share a GPU, where a host has more workers than GPUs.

        Raises:
            UsageError: the framework can't be used as it is set up (such as Keras on the jax backend),
                there are fewer workers than groups, no GPU where one is asked for, more workers than
                GPUs that they were told to take, or one that can't be used.
        """

    def stop(self) -> None:
        """Leave the job cleanly; every rank calls it, after its last collective call. May be repeated.

        With groups it returns when all groups have come here.
        """

    def distribute(
        self,
        optimizer: Any,
        model: Any,
        *,
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
        compression: str = "none",
        reducer: str = "auto",
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
            compression: what is saved of the bytes, and lost of the digits, on the way: "none", "fp16", "bf16", "int8",
                "topk" (or "topk:0.01"), "powersgd" (or "powersgd:4"); see `toolkit.compression`.
            reducer: who adds up the gradients: "horovod"; "mpi": all of them in one operation in the calling
                thread, where MPI started the workers; "auto": whichever is faster for so many gradients, which is
                tried out when the first ones are there and no checkpoint tells who it was before. The optimizer's
                `reducer` tells who it is.

        Returns:
            The optimizer, still an instance of its class, with the same options.

        Raises:
            UsageError: wrong type, distributed twice, not started, or an option out of range.
        """

    def synchronize_batch_norm(self, model: Any) -> Any:
        """Have the model's BatchNorm layers take mean and variance over the samples of all ranks, in training.

        Without it each rank normalises its own samples, as Horovod does, and N workers do not compute what one does.
        With it they do, forward and backward, with unequal parts too, and the running statistics are alike on all
        ranks. Every rank calls it after `start`, before `distribute` and before the model is compiled or traced, and
        in training comes to the same layers in the same order: each is an all-reduce forward, and one backward.
        Evaluation, parameters and names stay as they are, so a checkpoint loads with it or without.

        The sample of weight 0 that a rank gets where a pass has none for it, as the batch has fewer samples than ranks
        times passes, is one of the samples (see `toolkit.sharding.Part`); of an empty tensor none is.

        Args:
            model: the model; its layers' classes are changed in place.

        Returns:
            The model.

        Raises:
            UsageError: not started, the model has no BatchNorm layer (yet), or one that can't be synchronised.
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

    def gather(self, value: Any, *, all_groups: bool = False) -> list[Any]:
        """Every rank's `value` (anything that pickles), in rank order, on every rank.

        Args:
            value: this rank's.
            all_groups: over the whole job, where `start` cut it into groups.
        """

    def exchange_flag(self, flag: bool | None) -> tuple[bool, str | None]:
        """Tell the other ranks something, without an operation of its own: a flag that travels with the gradients.

        From a call on, steps whose averaged gradients are not finite are left out, on all ranks alike, until a call
        with None. With several optimizers each looks at its own gradients.

        Args:
            flag: goes along with every averaging of gradients until the next call; None: nobody listens any more.

        Returns:
            (heard, broken): whether any rank's flag was up in an averaging since the last call, the same on every
            rank, where no step was left out; and None, or, where one was left out since then, the name of the first
            of this rank's gradients that was not finite ("" where only other ranks had one).
        """

    def on_device(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        """The framework's tensors of numpy arrays on this worker's device; any thread may call it.

        To a GPU they are copied by way of pinned memory beside what it computes, in torch, and are there when it
        returns, for use on the device's default stream. On a CPU they may share the arrays' memory.

        Args:
            arrays: any shapes, of a dtype that the framework has.

        Returns:
            A tensor for each array, of its shape and dtype.

        Raises:
            TypeError, ValueError: the framework's own, for a dtype that it lacks.
        """

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

        Left out are BatchNorm's running statistics, which each rank keeps of its own samples.
        """

    def seed_local(self, model: Any, seed: int, rank: int) -> None:
        """Seed all random generators anew: Python's and numpy's alike on all ranks, the framework's by rank.

        So each rank's dropout draws its own numbers, also that of the model's random layers.

        Args:
            model: the model.
            seed: 0 … 2³² − 1.
            rank: this rank.
        """

    def export_local(self, model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
        """Copies of what each rank keeps for itself: random states, BatchNorm's statistics, compression's memory.

        Returns:
            `random/<generator>` of Python, numpy, the framework and the model's random layers,
            `model/<name>` of the running statistics, under the names of `export_state`, and
            `compression/<name>` of what a distributed optimizer's compression carries from step to step.
        """

    def import_local(self, model: Any, state: Mapping[str, np.ndarray], optimizer: Any = None) -> None:
        """Put back what `export_local` gave, all or nothing.

        What a worker on a GPU keeps of that GPU's generator one on a CPU leaves out, and one on a GPU does without
        where it comes from a CPU.

        Raises:
            UsageError: names, shapes or dtypes differ.
        """

    def usage(self) -> dict[str, float]:
        """What this worker takes of its GPU; {} on a CPU.

        Returns:
            `gpu_memory_megabytes`: the most that tensors have had of its memory at a time since `start`, in 10⁶ bytes;
            `gpu_utilization_percent`: of the last moments, in which it computed anything, where NVML tells it.
        """

    def describe(self, model: Any) -> dict[str, Any]:
        """What a checkpoint says of where it comes from; JSON values.

        Returns:
            `framework` ("torch", "tensorflow" or "keras") and `versions` of the packages behind it. For
            torch, the names of those tensors that `export_state` widens from `bfloat16`. For Keras its
            `backend`, and `architecture` (text): the model's configuration, None where it has none.
        """

"""Averaging of torch gradients over all ranks, and torch's random state, for the torch adapter and Keras on torch."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from toolkit import watch
from toolkit.adapters import _job

COMPRESSORS = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}


@dataclass
class _Exchange:
    """What travels beside the gradients; see `exchange_flag`."""

    flag: bool = False
    heard: bool = False
    broken: str | None = None
    guarded: bool = False


_exchange = _Exchange()


def exchange_flag(flag: bool | None) -> tuple[bool, str | None]:
    """See `toolkit.adapters.Adapter.exchange_flag`."""
    heard, broken = _exchange.heard, _exchange.broken
    _exchange.flag, _exchange.heard, _exchange.broken, _exchange.guarded = bool(flag), False, None, flag is not None
    return heard, broken


def first_broken(
    means: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None], names: Sequence[str]
) -> str | None:
    """None where the means over all ranks are finite, or nobody asks; else this rank's first that is not, or ""."""
    if not _exchange.guarded or _are_finite(means):
        return None
    return next((name for name, g in zip(names, gradients, strict=True) if not _are_finite([g])), "")


def leave_out(broken: str) -> None:
    """Note that a step was left out, with what `first_broken` gave."""
    if _exchange.broken is None:
        _exchange.broken = broken


def _are_finite(tensors: Sequence[torch.Tensor | None]) -> bool:
    values = [t.coalesce().values() if t.is_sparse else t for t in tensors if t is not None]
    if not values:
        return True
    # A sum is finite only where every element is; it takes a tenth of the time of looking at each.
    if torch.stack([v.sum() for v in values]).isfinite().all():
        return True
    return all(bool(v.isfinite().all()) for v in values)


def average_gradients(
    gradients: Sequence[torch.Tensor | None],
    parameters: Sequence[torch.Tensor],
    *,
    sparse: Sequence[bool] | None = None,
    compression: str = "none",
    name: str,
) -> list[torch.Tensor | None]:
    """The mean of each gradient over all ranks.

    A gradient missing (None) on some ranks counts as zero there; one missing on every rank stays None.
    Which are missing travels in the same grouped all-reduce, as one more small tensor, and the rank's flag with it.

    Args:
        gradients: one per parameter, of its shape; bfloat16, which Horovod lacks, travels as float32.
        parameters: what the gradients belong to, alike on all ranks.
        sparse: which gradients are sparse tensors, alike on all ranks; None: none is.
        compression: a key of `COMPRESSORS`; sparse gradients travel uncompressed.
        name: names the collective operation; the same on all ranks.
    """
    if not parameters:
        return []
    sparse = sparse or [False] * len(parameters)
    said = [*(g is not None for g in gradients), _exchange.flag]
    present = torch.tensor(said, dtype=torch.float32, device=parameters[0].device)
    dense = [
        _wire(torch.zeros_like(p) if g is None else g.to_dense())
        for g, p, is_sparse in zip(gradients, parameters, sparse, strict=True)
        if not is_sparse
    ]
    packed = [COMPRESSORS[compression].compress(g) for g in dense]
    tensors = [present, *(tensor for tensor, _ in packed)]
    with watch.waiting(name):
        reduced = hvd.grouped_allreduce(tensors, name=name, op=hvd.Average, process_set=_job.process_set())
    *present, heard = reduced[0].tolist()
    _exchange.heard |= heard > 0
    dense_means = iter(
        COMPRESSORS[compression].decompress(tensor, context)
        for tensor, (_, context) in zip(reduced[1:], packed, strict=True)
    )
    means: list[torch.Tensor | None] = []
    for i, (gradient, parameter, is_sparse) in enumerate(zip(gradients, parameters, sparse, strict=True)):
        mean = _average_sparse(gradient, parameter, f"{name}.sparse{i}") if is_sparse else next(dense_means)
        means.append(mean.to(parameter.dtype) if present[i] > 0 else None)
    return means


def _wire(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous()


def _average_sparse(gradient: torch.Tensor | None, parameter: torch.Tensor, name: str) -> torch.Tensor:
    """The mean of a sparse COO gradient over all ranks, by gathering every rank's rows."""
    if gradient is None:
        gradient = torch.zeros_like(parameter).to_sparse(1)
    gradient = gradient.coalesce()
    # Horovod gathers along the first dimension, which may differ in length between ranks.
    ranks = _job.process_set()
    with watch.waiting(name):
        indices = hvd.allgather(gradient.indices().t().contiguous(), f"{name}.indices", ranks)
        values = hvd.allgather(_wire(gradient.values()), f"{name}.values", ranks)
    mean = torch.sparse_coo_tensor(indices.t(), values / ranks.size(), parameter.shape, check_invariants=True)
    return mean.coalesce()


def all_reduce_sum(vector: np.ndarray) -> np.ndarray:
    """The sum of a float64 vector over all ranks."""
    ranks = _job.process_set()
    with watch.waiting("average()"):
        return hvd.allreduce(torch.from_numpy(vector), op=hvd.Sum, name="hvdkit.sum", process_set=ranks).numpy()


def gather(value: Any, process_set: Any) -> list[Any]:
    """Every rank's value, in rank order; Horovod's own function for it knows no process sets."""
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    with watch.waiting("gather()", all_groups=process_set is not _job.process_set()):
        lengths = hvd.allgather(torch.tensor([len(data)]), "hvdkit.gather.lengths", process_set)
        gathered = hvd.allgather(data, "hvdkit.gather", process_set)
    return [pickle.loads(part.numpy().tobytes()) for part in gathered.split(lengths.tolist())]


def be_deterministic() -> None:
    """Have every operation of torch give the same bits in every run."""
    torch.use_deterministic_algorithms(True)


def seed_random(seed: int) -> None:
    """Seed torch's global generator."""
    torch.manual_seed(seed)


def export_random() -> dict[str, np.ndarray]:
    """The state of torch's global generator."""
    return {"random/torch": torch.get_rng_state().numpy().copy()}


def import_random(state: Mapping[str, np.ndarray]) -> None:
    """Put back what `export_random` gave."""
    torch.set_rng_state(torch.from_numpy(state["random/torch"].copy()))

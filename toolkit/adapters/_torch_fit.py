"""Whether a saved optimizer's state fits a torch optimizer, which `load_state_dict` hardly asks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from toolkit.adapters import _shared

# Options that are no part of what is computed (how it is computed; what a scheduler notes), so may come and go.
_FREE = {"foreach", "fused", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
_STATE, _GROUP = "optimizer/state/", "optimizer/group"


def optimizer_differences(
    model: torch.nn.Module, optimizer: Any, saved: Mapping[str, np.ndarray], here: Mapping[str, np.ndarray]
) -> list[str]:
    """What does not fit, a text each.

    The options' values need not agree: the saved ones count. What an optimizer keeps per parameter
    does not exist before its first step, so shapes are compared with the parameter's as far as
    torch's own optimizers go; of another kind they are compared with what is there.

    Args:
        model: the model.
        optimizer: of the model's parameters.
        saved: names to arrays, all of `optimizer/…`.
        here: what `export_state` gives now.
    """
    numbers = [
        f"{name} is {array.dtype}{list(array.shape)} where a single number belongs"
        for name, array in saved.items()
        if name.endswith("#") and array.ndim > 0
    ]
    unknown = [f"{name} is not in this optimizer" for name in saved if not name.startswith((_STATE, _GROUP))]
    return numbers + unknown + _options(saved, here) + list(_states(model, optimizer, saved, here))


def _options(saved: Mapping[str, np.ndarray], here: Mapping[str, np.ndarray]) -> list[str]:
    """Differences of the groups: their number, their options' names, an option that is a list or tensor."""
    found, expected = ({n: a for n, a in state.items() if n.startswith(_GROUP)} for state in (saved, here))
    for name in found.keys() & expected.keys():
        alike = (found[name].dtype.kind == "b") == (expected[name].dtype.kind == "b")
        if name.endswith("[]#") and found[name].ndim == 0 and found[name] != expected[name]:
            return [f"{name[:-3]} has {found[name]} items where the optimizer has {expected[name]}"]
        if name.endswith("#") and alike:
            found[name] = expected[name]  # a number, such as 0 or 0.01
    free = {name for name in found.keys() ^ expected.keys() if re.split(r"[\[#/]", name.split("/")[2])[0] in _FREE}
    return _shared.differences(
        {n: a for n, a in found.items() if n not in free}, {n: a for n, a in expected.items() if n not in free}
    )


def _states(
    model: torch.nn.Module, optimizer: Any, saved: Mapping[str, np.ndarray], here: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Differences of what is kept per parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    torchs_own = type(optimizer).__module__.startswith("torch.optim.")
    placed: set[str] = set()
    flat = sum(p.numel() * (2 if p.is_complex() else 1) for g in optimizer.param_groups for p in g["params"])
    for group in optimizer.param_groups:
        alike: dict[bool, dict[str, set[str]]] = {}
        for p in group["params"]:
            prefix = f"{_STATE}{names[id(p)]}/"
            kept = {name: array for name, array in saved.items() if name.startswith(prefix)}
            placed |= kept.keys()
            yield from _shared.differences(
                {n: a for n, a in kept.items() if n in here and not n.endswith("#")},
                {n: here[n] for n in kept if n in here and not n.endswith("#")},
            )
            if torchs_own and kept:
                yield from _unlike_parameter(p, {n: a for n, a in kept.items() if n not in here}, flat)
                matrix = isinstance(optimizer, torch.optim.Adafactor) and p.ndim > 1  # has a state of its own kind
                alike.setdefault(matrix, {})[prefix] = {name.removeprefix(prefix) for name in kept}
        for keys in alike.values():
            owners = {key: prefix for prefix, mine in keys.items() for key in mine}
            for prefix, mine in keys.items():
                lacking = owners.keys() - mine
                yield from (f"{prefix}{key} is missing while there is {owners[key]}{key}" for key in lacking)
    yield from (f"{n} is not in this optimizer" for n in saved if n.startswith(_STATE) and n not in placed)


# Of torch's own optimizers, what has the parameter's shape; other states may be a number, such as `step`.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "sum")


def _unlike_parameter(p: torch.Tensor, kept: Mapping[str, np.ndarray], flat: int) -> Iterator[str]:
    """A state tensor is a number, has the parameter's shape (Adafactor: 1 in places), or is flat over all (LBFGS)."""
    dtype = _numpy_dtype(p)
    for name, array in kept.items():
        broadcasts = array.ndim <= p.ndim and all(
            n in (1, m) for n, m in zip(array.shape[::-1], tuple(p.shape)[::-1], strict=False)
        )
        fits = broadcasts and math.prod(array.shape) <= p.numel() or array.shape == (flat,)
        if array.ndim == 0 < p.ndim and name.rpartition("/")[2] in _MOMENTS:
            fits = False
        if not fits or (array.ndim > 0 and array.dtype != dtype):
            yield (f"{name} is {array.dtype}{list(array.shape)} where the parameter is {dtype}{list(p.shape)}")


def _numpy_dtype(p: torch.Tensor) -> np.dtype:
    """The dtype that `export_state` gives a parameter."""
    return torch.empty(0, dtype=torch.float32 if p.dtype == torch.bfloat16 else p.dtype).numpy().dtype

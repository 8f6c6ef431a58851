"""Names, export, import and broadcast of torch models and optimizers, for the torch adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from toolkit import watch
from toolkit.adapters import _job, _shared, _torch_fit, _torch_ops

_PARTS = ("model/", "optimizer/")


def broadcast_state(model: torch.nn.Module, optimizer: Any) -> None:
    """Give every rank rank 0's parameters, buffers and optimizer state."""
    with watch.waiting("broadcast_state()"):
        _broadcast_state(model, optimizer)


def _broadcast_state(model: torch.nn.Module, optimizer: Any) -> None:
    root, process_set = _job.root_rank(), _job.process_set()
    for name, tensor in _model_tensors(model).items():
        wire = tensor.detach().contiguous()
        wire = wire if _job.reduces_on_gpu() else wire.cpu()
        if wire.dtype == torch.bfloat16:  # which Horovod does not know; its bits travel
            wire = wire.view(torch.int16)
        if wire.numel():
            hvd.broadcast_(wire, root, f"state.{name}", process_set)  # into the tensor itself, where it can be
            if hvd.rank() != root and wire.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(wire.view(tensor.dtype))
    if optimizer is not None:
        # Pickled on a GPU, tensors would come to the others on the GPU of rank 0's number.
        state = hvd.broadcast_object(_on_host(optimizer.state_dict()), root, "optimizer", process_set)
        if hvd.rank() != root:
            optimizer.load_state_dict(state)


def _on_host(value: Any) -> Any:
    """The value with the tensors in its dicts, lists and tuples in the host's memory."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_host(each) for key, each in value.items()}
    return type(value)(map(_on_host, value)) if type(value) in (list, tuple) else value


def export_state(model: torch.nn.Module, optimizer: Any) -> dict[str, np.ndarray]:
    """Copies of all tensors and numbers, by name."""
    state = {f"model/{name}": _to_numpy(tensor) for name, tensor in _model_tensors(model).items()}
    if optimizer is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        for i, group in enumerate(optimizer.param_groups):
            options = {key: value for key, value in group.items() if key != "params"}
            _flatten(f"optimizer/group{i}", options, state)
            for p in group["params"]:
                _flatten(f"optimizer/state/{names[id(p)]}", optimizer.state.get(p, {}), state)
    return state


def import_state(model: torch.nn.Module, optimizer: Any, state: Mapping[str, np.ndarray]) -> None:
    """Put back what `export_state` gave, or raise `UsageError` and change nothing."""
    here = export_state(model, optimizer)
    problems = _shared.differences(_part("model/", state), _part("model/", here))
    if optimizer is not None:
        problems += [f"{name} is neither model/… nor optimizer/…" for name in state if not name.startswith(_PARTS)]
        problems += _torch_fit.optimizer_differences(model, optimizer, _part("optimizer/", state), here)
    _shared.refuse(problems)
    loaded = None if optimizer is None else _optimizer_state_dict(model, optimizer, state)
    try:
        _copy_into(model, state)
        if loaded is not None:
            optimizer.load_state_dict(loaded)
    except BaseException:  # an optimizer of one's own may refuse its state; a buffer may be read-only
        _copy_into(model, here)
        raise


def export_local(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies of this rank's random states and of BatchNorm's running statistics."""
    statistic = statistics(model)
    return {
        **_shared.export_python_and_numpy(),
        **_torch_ops.export_random(),
        **{f"model/{name}": _to_numpy(t) for name, t in _model_tensors(model).items() if f"model/{name}" in statistic},
    }


def import_local(model: torch.nn.Module, state: Mapping[str, np.ndarray]) -> None:
    """Put back what `export_local` gave, or raise `UsageError` and change nothing."""
    _shared.check_local_fits(state, export_local(model))
    _shared.import_python_and_numpy(state)
    _torch_ops.import_random(state)
    _copy_into(model, state)


def statistics(model: torch.nn.Module) -> set[str]:
    """The names of BatchNorm's running statistics, which each rank keeps of its own samples."""
    return {
        "/".join(["model", f"{name}.{buffer}" if name else buffer])
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._NormBase)
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }


def widened(model: torch.nn.Module) -> list[str]:
    """The names of those tensors of `export_state` that it widens from bfloat16, without `model/`."""
    return [name for name, tensor in _model_tensors(model).items() if tensor.dtype == torch.bfloat16]


def _copy_into(model: torch.nn.Module, state: Mapping[str, np.ndarray]) -> None:
    with torch.no_grad():
        for name, tensor in _model_tensors(model).items():
            if f"model/{name}" in state:
                tensor.copy_(torch.from_numpy(state[f"model/{name}"].copy()))


def _part(prefix: str, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in state.items() if name.startswith(prefix)}


def _model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.numpy().copy()


def _flatten(prefix: str, value: Any, into: dict[str, np.ndarray]) -> None:
    """Write nested dicts, lists, tensors and numbers as named arrays; drop None, texts and functions."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{prefix}/{key}", item, into)
    elif isinstance(value, list | tuple):
        into[f"{prefix}[]#"] = np.asarray(len(value))  # items that are None leave no array of their own
        for i, item in enumerate(value):
            _flatten(f"{prefix}[{i}]", item, into)
    elif isinstance(value, torch.Tensor):
        into[prefix] = _to_numpy(value)
    elif isinstance(value, bool | int | float):
        into[f"{prefix}#"] = np.asarray(value)


def _optimizer_state_dict(model: torch.nn.Module, optimizer: Any, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `_flatten`: what `optimizer.load_state_dict` takes."""
    # A copy, as a state dict shares what its options hold with the optimizer.
    loaded = {"state": {}, "param_groups": copy.deepcopy(optimizer.state_dict()["param_groups"])}
    names = {id(p): name for name, p in model.named_parameters()}
    places = {f"group{i}": group for i, group in enumerate(loaded["param_groups"])}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        prefix = f"optimizer/state/{names[id(p)]}/"
        if any(name.startswith(prefix) for name in state):
            places[f"state/{names[id(p)]}"] = loaded["state"].setdefault(i, {})
    lengths_first = sorted(_part("optimizer/", state).items(), key=lambda item: not item[0].endswith("[]#"))
    for name, array in lengths_first:
        value: Any = array.item() if name.endswith("#") else torch.from_numpy(array.copy())
        rest = name.removeprefix("optimizer/").rstrip("#")
        place = max((place for place in places if rest.startswith(f"{place}/")), key=len)
        target = places[place]
        *path, key = rest.removeprefix(f"{place}/").split("/")
        for part in path:
            target = target.setdefault(part, {})
        _put(target, key, value)
    return loaded


def _put(target: dict[str, Any], key: str, value: Any) -> None:
    """Set `key`; or the length of a list with `key[]`, its third item with `key[2]`; tuples stay tuples."""
    if not key.endswith("]"):
        target[key] = value
        return
    key, index = key[:-1].split("[")
    old = target.get(key)
    items = [None] * value if index == "" else list(old or [])
    if index:
        items[int(index)] = value
    target[key] = tuple(items) if isinstance(old, tuple) else items

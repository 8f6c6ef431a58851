"""The torch adapter: `toolkit.adapters.Adapter` for any `torch.optim` optimizer and `torch.nn.Module`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from toolkit.adapters import _shared, _torch_ops
from toolkit.errors import UsageError
from toolkit.world import World

_names = (f"gradients{i}" for i in itertools.count())  # of collectives: the i-th distribute() on every rank


def start(*, seed: int = 0, tune: bool = True, verbose: bool = False) -> World:
    """See `toolkit.adapters.Adapter.start`."""
    here, choices = _shared.start_horovod(hvd, tune=tune, verbose=verbose)
    if choices.threads:
        torch.set_num_threads(choices.threads)
    torch.manual_seed(seed)
    _shared.seed_python_and_numpy(seed)
    return here


def stop() -> None:
    """See `toolkit.adapters.Adapter.stop`."""
    hvd.shutdown()


def distribute(
    optimizer: Any,
    model: Any,
    *,
    accumulation_steps: int = 1,
    clip_norm: float | None = None,
    compression: str = "none",
) -> Any:
    """See `toolkit.adapters.Adapter.distribute`.

    The gradients in `parameter.grad` are the mean over all ranks as soon as `backward()` returns
    (with accumulation: as soon as the k-th one returns), so that `torch.amp.GradScaler`, one's own
    clipping and closures (LBFGS) work as in one process. Between accumulated passes `step()` and
    `zero_grad()` of the optimizer do nothing; `optimizer.flush()` applies an unfinished
    accumulation as the mean over the passes that it has.
    """
    _shared.require_started(hvd)
    _shared.check_distribute_options(accumulation_steps, clip_norm, compression)
    _check_optimizer(optimizer, model)
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (_Distributed, kind), {"__module__": kind.__module__})
    optimizer._attach(model, accumulation_steps, clip_norm, compression)
    return optimizer


def _check_optimizer(optimizer: Any, model: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"the optimizer is a {type(optimizer).__module__}.{type(optimizer).__name__}: "
            "give a torch.optim.Optimizer, or use the adapter of its framework."
        )
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}: give the torch.nn.Module that the optimizer trains.")
    if isinstance(optimizer, _Distributed):
        raise UsageError("this optimizer is distributed already: call distribute() once.")
    if hasattr(optimizer, "synchronize") and hasattr(optimizer, "skip_synchronize"):
        raise UsageError("this optimizer was wrapped by horovod.torch.DistributedOptimizer: pass the plain optimizer.")
    if "step" in vars(optimizer):
        raise UsageError(
            "a learning-rate scheduler already holds this optimizer's step(): create it after distribute()."
        )
    named = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if id(p) not in named:
                raise UsageError(
                    f"parameter {i} of group {g}, of shape {list(p.shape)}, is not a parameter of the model: "
                    "pass the model that owns every parameter of the optimizer."
                )
            if id(p) in seen:
                raise UsageError(f"the optimizer holds the parameter {named[id(p)]} twice: give it once.")
            seen.add(id(p))


class _Distributed(torch.optim.Optimizer):
    """Mixed in before an optimizer's own class by `distribute`; has no constructor of its own."""

    def _attach(self, model: torch.nn.Module, accumulation_steps: int, clip_norm: float | None, compression: str):
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._sparse = {
            id(m.weight)
            for m in model.modules()
            if isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag) and m.sparse
        }
        self._accumulation_steps, self._clip_norm, self._compression = (
            accumulation_steps,
            clip_norm,
            compression,
        )
        self._collective = next(_names)
        self._passes = 0  # backward passes since the last step
        self._callback_queued = False
        self._hooked: set[int] = set()
        self._held: list[Any] = []
        self._hook_parameters()

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _hook_parameters(self) -> None:
        for p in self._parameters():
            if id(p) not in self._hooked:
                p.register_post_accumulate_grad_hook(self._queue_callback)
                self._hooked.add(id(p))

    def _queue_callback(self, _: torch.Tensor) -> None:
        """After a parameter's gradient: have the engine call us once, at the end of this backward pass."""
        if not self._callback_queued:
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _end_of_backward(self) -> None:
        self._callback_queued = False
        self._passes += 1
        k = self._accumulation_steps
        if self._passes > k > 1:
            raise UsageError(
                f"more than accumulation_steps={k} backward passes without a step(): call step() after them."
            )
        if self._passes >= k:
            self._average(k)

    @torch.no_grad()
    def _average(self, passes: int) -> None:
        """Replace every gradient by its mean over all ranks and over `passes` accumulated passes."""
        parameters = self._parameters()
        if any(before is not None and p.grad is not before for p, before in zip(parameters, self._held, strict=False)):
            raise UsageError(
                "gradients were cleared between accumulated passes: clear them by the optimizer's zero_grad()."
            )
        self._held = []
        means = _torch_ops.average_gradients(
            [p.grad for p in parameters],
            parameters,
            sparse=[id(p) in self._sparse for p in parameters],
            compression=self._compression,
            name=self._collective,
        )
        for p, mean in zip(parameters, means, strict=True):
            p.grad = mean if mean is None or passes == 1 else mean / passes

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from the averaged gradients; while accumulating, do nothing."""
        self._hook_parameters()
        if closure is None and self._passes < self._accumulation_steps:
            if self._passes > 0:
                self._held = [p.grad for p in self._parameters()]
                return None
            self._average(1)  # gradients that no backward pass of ours has seen
        if closure is not None:
            if self._accumulation_steps > 1:
                raise UsageError("step(closure) evaluates whole batches: use accumulation_steps=1 with it.")
            result: Any = super().step(self._averaged_closure(closure))
        else:
            self._clip()
            result = super().step()
        self._passes = 0
        return result

    def flush(self) -> Any:
        """Apply an unfinished accumulation as the mean over the passes that it has; else do nothing.

        Every rank calls it at the same point, as after the last batch of an epoch.
        """
        if not 0 < self._passes < self._accumulation_steps:
            return None
        self._average(self._passes)
        self._passes = self._accumulation_steps
        return self.step()

    def _averaged_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with the loss's mean over all ranks, so that line searches decide alike."""

        def averaged() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._clip()
            return hvd.allreduce(torch.as_tensor(loss).detach(), name="closure.loss", op=hvd.Average)

        return averaged

    def _clip(self) -> None:
        if self._clip_norm is not None:
            scale: Any = getattr(self, "grad_scale", None)  # set by GradScaler when the step itself unscales
            limit = self._clip_norm * (1.0 if scale is None else float(scale))
            torch.nn.utils.clip_grad_norm_(self._parameters(), limit)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; between accumulated passes, keep them."""
        if not 0 < self._passes < self._accumulation_steps:
            self._passes = 0
            super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters, which must be the model's, as `torch.optim.Optimizer.add_param_group` does."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if id(p) not in self._names:
                del self.param_groups[-1]
                raise UsageError(f"a new parameter of shape {list(p.shape)} is not a parameter of the model.")
        self._hook_parameters()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by `GradScaler.step` before it touches the gradients."""
        if 0 < self._passes < self._accumulation_steps:
            raise UsageError(
                f"GradScaler.step() after {self._passes} of {self._accumulation_steps} accumulated passes: "
                "call it, and update(), once after the last of them."
            )
        return vars(self).get("_step_supports_amp_scaling", False)


def broadcast_state(model: Any, optimizer: Any = None) -> None:
    """See `toolkit.adapters.Adapter.broadcast_state`."""
    _shared.require_started(hvd)
    hvd.broadcast_parameters({n: t for n, t in _model_tensors(model).items() if t.numel()}, root_rank=0)
    if optimizer is not None:
        state = hvd.broadcast_object(optimizer.state_dict(), root_rank=0, name="optimizer")
        if hvd.rank() != 0:
            optimizer.load_state_dict(state)


def average(values: Mapping[str, float | np.ndarray], weight: float = 1.0) -> dict[str, float | np.ndarray]:
    """See `toolkit.adapters.Adapter.average`."""
    _shared.require_started(hvd)
    return _shared.weighted_average(values, weight, _torch_ops.all_reduce_sum)


def gather(value: Any) -> list[Any]:
    """See `toolkit.adapters.Adapter.gather`."""
    _shared.require_started(hvd)
    return hvd.allgather_object(value, name="hvdkit.gather")


def export_state(model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
    """See `toolkit.adapters.Adapter.export_state`.

    Of the optimizer: `optimizer/group<i>/<option>` for its numeric options, and
    `optimizer/state/<parameter>/<key>` for what it keeps per parameter; plain numbers end in `#`.
    """
    state = {f"model/{name}": _to_numpy(tensor) for name, tensor in _model_tensors(model).items()}
    if optimizer is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        for i, group in enumerate(optimizer.param_groups):
            options = {key: value for key, value in group.items() if key != "params"}
            _flatten(f"optimizer/group{i}", options, state)
            for p in group["params"]:
                _flatten(f"optimizer/state/{names[id(p)]}", optimizer.state.get(p, {}), state)
    return state


def import_state(model: Any, optimizer: Any, state: Mapping[str, np.ndarray]) -> None:
    """See `toolkit.adapters.Adapter.import_state`."""
    here = export_state(model, optimizer)
    # An optimizer that has not stepped has no state yet that the saved one could be compared with.
    comparable = {n: a for n, a in state.items() if n.startswith("model/") or (n in here and not n.endswith("#"))}
    _shared.check_state_fits(comparable, {n: a for n, a in here.items() if n.startswith("model/") or n in comparable})
    loaded = None if optimizer is None else _optimizer_state_dict(model, optimizer, state)
    with torch.no_grad():
        for name, tensor in _model_tensors(model).items():
            tensor.copy_(torch.from_numpy(state[f"model/{name}"].copy()))
    if loaded is not None:
        optimizer.load_state_dict(loaded)


def digest(model: Any, optimizer: Any = None) -> dict[str, str]:
    """See `toolkit.adapters.Adapter.digest`; BatchNorm's running statistics are left out."""
    own = {
        f"model/{name}.{buffer}".replace("/.", "/")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._NormBase)
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    state = export_state(model, optimizer)
    return _shared.digest_arrays({name: array for name, array in state.items() if name not in own})


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
    loaded = optimizer.state_dict()
    loaded["state"] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    indices = {names[id(p)]: i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    for name, array in state.items():
        if not name.startswith("optimizer/"):
            continue
        value: Any = array.item() if name.endswith("#") else torch.from_numpy(array.copy())
        _, owner, *path = name.rstrip("#").split("/")
        try:
            if owner == "state":
                target = loaded["state"].setdefault(indices[path.pop(0)], {})
            else:
                target = loaded["param_groups"][int(owner.removeprefix("group"))]
        except (KeyError, IndexError, ValueError):
            raise UsageError(
                f"the saved state does not fit this optimizer: it has no place for {name}. "
                "Build the optimizer with the options that it was saved with."
            ) from None
        _put(target, path[0], value)
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

"""The torch adapter: `toolkit.adapters.Adapter` for any `torch.optim` optimizer and `torch.nn.Module`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from toolkit.adapters import _job, _reduction, _shared, _torch_batch_norm, _torch_ops, _torch_state
from toolkit.adapters._torch_average import GradientAverager
from toolkit.adapters._torch_data import Loader as Loader
from toolkit.errors import RunFailed, UsageError
from toolkit.world import World

_engine = torch.autograd.Variable._execution_engine
_HOOK = "_hvdkit_hook"  # a parameter's attribute: the optimizer that averages its gradient, and the hook


def start(
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
    """See `toolkit.adapters.Adapter.start`."""
    here, choices = _job.start_horovod(
        hvd,
        _torch_ops,
        tune=tune,
        verbose=verbose,
        deterministic=deterministic,
        groups=groups,
        stall_timeout=stall_timeout,
        device=device,
    )
    here = _job.choose_device(hvd, here, device, share_gpus, _torch_ops)
    if deterministic:
        _torch_ops.be_deterministic()
    if choices.threads:
        _torch_ops.set_threads(choices.threads)
    torch.manual_seed(seed)
    _shared.seed_python_and_numpy(seed)
    _job.check_devices(hvd, here, device, share_gpus, gather)
    _job.begin_watch(hvd, here, gather, stall_timeout)
    return here


def stop() -> None:
    """See `toolkit.adapters.Adapter.stop`."""
    _job.stop_horovod(hvd, gather)


def distribute(
    optimizer: Any,
    model: Any,
    *,
    accumulation_steps: int = 1,
    clip_norm: float | None = None,
    compression: str = "none",
    reducer: str = "auto",
) -> Any:
    """See `toolkit.adapters.Adapter.distribute`.

    The gradients in `parameter.grad` are the mean over all ranks as soon as `backward()` returns
    (with accumulation: as soon as the k-th one returns), so that `torch.amp.GradScaler`, one's own
    clipping and closures (LBFGS) work as in one process. Between accumulated passes `step()` and
    `zero_grad()` of the optimizer do nothing; `optimizer.flush()` applies an unfinished
    accumulation as the mean over the passes that it has. Clear gradients by the optimizer's
    `zero_grad()`, not the model's, between accumulated passes.

    Every rank makes the same calls of `backward()` and `step()`. With several optimizers under one
    `backward()`, it must reach each of them on every rank or on none.
    """
    _job.require_started(hvd)
    _shared.check_distribute_options(accumulation_steps, clip_norm, compression, reducer)
    _check_optimizer(optimizer, model)
    if clip_norm is not None and _sparse_parameters(model):
        raise UsageError("clip_norm with sparse embeddings: torch can't take their norm; use sparse=False or None.")
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (_Distributed, kind), {"__module__": kind.__module__})
    optimizer._attach(model, accumulation_steps, clip_norm, compression, reducer)
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


def _sparse_parameters(model: torch.nn.Module) -> set[int]:
    """The ids of parameters whose gradients are sparse tensors."""
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return {id(module.weight) for module in model.modules() if isinstance(module, kinds) and module.sparse}


class _Distributed(torch.optim.Optimizer):
    """Mixed in before an optimizer's own class by `distribute`; has no constructor of its own."""

    def _attach(
        self,
        model: torch.nn.Module,
        accumulation_steps: int,
        clip_norm: float | None,
        compression: str,
        reducer: str,
    ) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._sparse = _sparse_parameters(model)
        self._accumulation_steps, self._clip_norm = accumulation_steps, clip_norm
        self._averager = GradientAverager(_job.collective_name(), compression, reducer)
        self._one_calls = self._averager.is_alone and accumulation_steps == 1
        self._passes = 0  # backward passes since the last step
        self._passes_at_step = 0  # and how many of them the latest step() knew
        self._open: set[int] = set()  # backward passes at whose end our callback is queued
        self._may_send = False  # whether gradients of the present one may travel
        self._lock = threading.Lock()  # gradients of a CPU and of a GPU get ready in a thread for each
        self._held: list[Any] = []
        self._broken: str | None = None  # where the averaged gradients are not finite: the first of this rank's
        self._hook_parameters()

    @property
    def passes_per_step(self) -> int:
        """The `accumulation_steps` of `distribute`."""
        return self._accumulation_steps

    @property
    def compression(self) -> str:
        """The `compression` of `distribute`."""
        return self._averager.compression

    @property
    def reducer(self) -> str | None:
        """Who adds up the gradients; see `toolkit.adapters._reduction.Averager`."""
        return self._averager.reducer

    @reducer.setter
    def reducer(self, reducer: str) -> None:
        self._averager.reducer = reducer

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _hook_parameters(self) -> None:
        """Have parameters call us once their gradients are there, in place of an earlier optimizer's hooks.

        Of one worker's only the last one does: where a backward pass does not reach it, `step` is early enough, as
        nobody waits for these gradients, and they are their own mean. Accumulated passes must all be counted.
        """
        hook = self._send_when_ready if self._averager.overlaps else self._queue_callback
        parameters = self._parameters()
        for p in parameters:
            owner, handle = getattr(p, _HOOK, (None, None))
            if owner is not self:
                if handle is not None:
                    handle.remove()
                calls = not self._one_calls or p is parameters[-1]
                setattr(p, _HOOK, (self, p.register_post_accumulate_grad_hook(hook) if calls else None))

    def _queue_callback(self, _: torch.Tensor) -> None:
        """After a parameter's gradient: have the engine call us once, at the end of this backward pass."""
        backward = torch._C._current_graph_task_id()
        if backward not in self._open:
            self._open.add(backward)
            _engine.queue_callback(functools.partial(self._end_of_backward, backward))

    def _send_when_ready(self, parameter: torch.Tensor) -> None:
        """The same where gradients travel while the backward pass goes on."""
        with self._lock:
            if torch._C._current_graph_task_id() not in self._open:
                self._may_send = self._accumulation_steps in (1, self._passes + 1)  # the last pass of a step
                self._queue_callback(parameter)
            self._averager.ready(parameter, self._accumulation_steps, self._may_send)

    def _end_of_backward(self, backward: int) -> None:
        self._open.discard(backward)
        if torch._C._current_autograd_node() is None:
            self._open.clear()  # of passes that failed
        elif self._open:  # it was within another one (re-entrant checkpointing), at whose end we are called too
            return
        elif self._accumulation_steps > 1:
            raise UsageError(
                "a backward pass ended within another one that has reached no parameter by itself, so with "
                f"accumulation_steps={self._accumulation_steps} it can't be told what is one pass: give "
                "torch.utils.checkpoint use_reentrant=False."
            )
        self._end_of_pass()

    def _end_of_pass(self) -> None:
        self._passes += 1
        k = self._accumulation_steps
        if self._passes > k > 1:
            raise UsageError(
                f"more than accumulation_steps={k} backward passes without a step(): call step() after them."
            )
        if self._passes >= k:
            self._average(k)

    def _average(self, passes: int) -> None:
        """Replace every gradient by its mean over all ranks and over `passes` accumulated passes."""
        parameters = self._parameters()
        held = zip(parameters, self._held, strict=False) if self._held else ()
        if any(before is not None and p.grad is not before for p, before in held):
            raise UsageError(
                "gradients were cleared between accumulated passes: clear them by the optimizer's zero_grad()."
            )
        self._held = []
        sparse = [id(p) in self._sparse for p in parameters] if self._sparse else None
        gradients = [p.grad for p in parameters]
        means = self._averager(gradients, parameters, sparse, passes)
        broken = self._averager.broken
        self._broken = None if broken is None else self._names[id(parameters[broken])] if broken >= 0 else ""
        if means is not gradients:
            for p, mean in zip(parameters, means, strict=True):
                p.grad = mean

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from the averaged gradients; while accumulating, do nothing."""
        if not self._one_calls:
            self._hook_parameters()
        if closure is not None:
            if self._accumulation_steps > 1:
                raise UsageError("step(closure) evaluates whole batches: use accumulation_steps=1 with it.")
            result: Any = super().step(self._averaged_closure(closure))
        else:
            if self._passes == self._passes_at_step:  # no backward pass has reached a parameter here
                self._end_of_pass()
            if self._passes < self._accumulation_steps:
                self._passes_at_step = self._passes
                self._held = [p.grad for p in self._parameters()]
                return None
            if self._broken is not None and getattr(self, "found_inf", None) is None:  # which is GradScaler's matter
                _reduction.leave_out(self._broken)
                result = None
            else:
                self._clip()
                result = super().step()
        self._passes = self._passes_at_step = 0
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
            self._passes = 0
            with torch.enable_grad():
                loss = closure()
            if self._passes == 0:  # gradients that came by no backward pass
                self._average(1)
            if self._broken is not None:
                found = enumerate(_torch_ops.gather(self._broken, _job.process_set()))
                first = next((f"rank {rank}: gradient of {name}" for rank, name in found if name), "the mean gradient")
                raise RunFailed(f"{first} not finite, and a step with a closure (LBFGS) can't be left out.")
            self._clip()
            loss = torch.as_tensor(loss).detach()
            total = _torch_ops.all_reduce_sum(loss.reshape(1).double().cpu().numpy(), "closure.loss")
            return torch.full_like(loss, total[0] / _job.process_set().size())

        return averaged

    def _clip(self) -> None:
        if self._clip_norm is not None:
            scale: Any = getattr(self, "grad_scale", None)  # set by GradScaler when the step itself unscales
            limit = self._clip_norm * (1.0 if scale is None else float(scale))
            torch.nn.utils.clip_grad_norm_(self._parameters(), limit)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; between accumulated passes, keep them."""
        if not 0 < self._passes < self._accumulation_steps:
            self._passes = self._passes_at_step = 0
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


def synchronize_batch_norm(model: Any) -> Any:
    """See `toolkit.adapters.Adapter.synchronize_batch_norm`; for `torch.nn.BatchNorm1d`, `2d` and `3d`.

    The gradients of its operations can't be differentiated again.
    """
    _job.require_started(hvd)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}: give the torch.nn.Module that is trained.")
    _torch_batch_norm.synchronize(model)
    return model


def broadcast_state(model: Any, optimizer: Any = None) -> None:
    """See `toolkit.adapters.Adapter.broadcast_state`."""
    _job.require_started(hvd)
    _torch_state.broadcast_state(model, optimizer)


def average(values: Mapping[str, float | np.ndarray], weight: float = 1.0) -> dict[str, float | np.ndarray]:
    """See `toolkit.adapters.Adapter.average`."""
    _job.require_started(hvd)
    return _shared.weighted_average(values, weight, _torch_ops.all_reduce_sum)


def gather(value: Any, *, all_groups: bool = False) -> list[Any]:
    """See `toolkit.adapters.Adapter.gather`."""
    _job.require_started(hvd)
    return _torch_ops.gather(value, _job.process_set(all_groups))


def exchange_flag(flag: bool | None) -> tuple[bool, str | None]:
    """See `toolkit.adapters.Adapter.exchange_flag`; under a GradScaler a gradient that is not finite is its matter."""
    return _reduction.exchange_flag(flag)


def on_device(*arrays: np.ndarray) -> tuple[Any, ...]:
    """See `toolkit.adapters.Adapter.on_device`."""
    return _torch_ops.on_device(arrays)


def export_state(model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
    """See `toolkit.adapters.Adapter.export_state`.

    Of the optimizer: `optimizer/group<i>/<option>` for its numeric options, and
    `optimizer/state/<parameter>/<key>` for what it keeps per parameter; plain numbers end in `#`.
    """
    return _torch_state.export_state(model, optimizer)


def import_state(model: Any, optimizer: Any, state: Mapping[str, np.ndarray]) -> None:
    """See `toolkit.adapters.Adapter.import_state`; the saved options of the optimizer count, as in torch."""
    _torch_state.import_state(model, optimizer, state)


def digest(model: Any, optimizer: Any = None) -> dict[str, str]:
    """See `toolkit.adapters.Adapter.digest`."""
    own = _torch_state.statistics(model)
    state = export_state(model, optimizer)
    return _shared.digest_arrays({name: array for name, array in state.items() if name not in own})


def seed_local(model: Any, seed: int, rank: int) -> None:
    """See `toolkit.adapters.Adapter.seed_local`."""
    _shared.seed_python_and_numpy(seed)
    _torch_ops.seed_random(_shared.framework_seed(seed, rank))


def export_local(model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
    """See `toolkit.adapters.Adapter.export_local`; `torch.Generator` objects of one's own are not among it."""
    kept = optimizer._averager.state() if isinstance(optimizer, _Distributed) else {}
    return {**_torch_state.export_local(model), **kept}


def import_local(model: Any, state: Mapping[str, np.ndarray], optimizer: Any = None) -> None:
    """See `toolkit.adapters.Adapter.import_local`."""
    _torch_state.import_local(model, _reduction.without_compression(state))
    if isinstance(optimizer, _Distributed):
        optimizer._averager.load_state(state)


def usage() -> dict[str, float]:
    """See `toolkit.adapters.Adapter.usage`."""
    return _job.usage(_torch_ops.peak_memory)


def describe(model: Any) -> dict[str, Any]:
    """See `toolkit.adapters.Adapter.describe`."""
    return {
        "framework": "torch",
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "bfloat16": _torch_state.widened(model),
    }

"""BatchNorm over the samples of all ranks, for the torch adapter and for Keras on torch.

Each rank tells the others how many values it has of a channel, and their sum and sum of squares, which it takes from
its own mean and variance. Added up in float64, for float32 they are as exact as a second pass.
"""

from __future__ import annotations

import functools
from typing import Any

import horovod.torch as hvd
import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from toolkit import watch
from toolkit.adapters import _job
from toolkit.errors import UsageError


def synchronize(model: torch.nn.Module) -> None:
    """Change the class of the model's BatchNorm layers, in place; parameters, buffers and hooks stay as they are.

    Raises:
        UsageError: there is none, or one that can't be synchronised; no layer was changed.
    """
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm | _LazyNormBase)}
    if not layers:
        raise UsageError(
            f"this {type(model).__name__} has no BatchNorm layer: leave synchronize_batch_norm() out, or call it once "
            "the model has its layers."
        )
    for name, layer in layers.items():
        _check(name, layer)
    for layer in layers.values():
        if not isinstance(layer, _Synchronized):
            kind: Any = type(layer)
            layer.__class__ = _synchronized(kind)
            layer._collective = _job.batch_norm_name()
    keep_quick()


def keep_quick() -> None:
    """Have Horovod answer quickly where a layer will wait for it; elsewhere MPI adds up, in the calling thread."""
    if _job.reduces_on_gpu():
        _job.keep_quick(hvd)


def _check(name: str, layer: Any) -> None:
    kind = type(layer)
    if isinstance(layer, _LazyNormBase):
        raise UsageError(
            f"{name} is a {kind.__name__} that has no parameters yet: call the model once on a batch, and then "
            "synchronize_batch_norm()."
        )
    if not isinstance(layer, _Synchronized) and kind.forward is not _BatchNorm.forward:
        raise UsageError(
            f"{name} is a {kind.__module__}.{kind.__name__}, which normalises by a forward() of its own: use "
            "torch.nn.BatchNorm1d, 2d or 3d, which synchronize_batch_norm() knows."
        )


@functools.cache
def _synchronized(kind: type) -> Any:
    """A class like a BatchNorm layer's, over all ranks' samples."""
    return type(kind.__name__, (_Synchronized, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _rebuilt(kind: type) -> Any:
    synchronized = _synchronized(kind)
    return synchronized.__new__(synchronized)


class _Synchronized(_BatchNorm):
    """Mixed in before a BatchNorm layer's own class by `synchronize`; has no constructor of its own."""

    _collective: str  # names its operations

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy, or what torch.load() makes of a saved model, finds no class made at run time by its name.
        return _rebuilt, (type(self).__mro__[2],), self.__dict__

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise; in training by the mean and variance over all ranks' samples."""
        return self._normalised(input) if self.training and _job.is_parallel(hvd) else super().forward(input)

    @torch.compiler.disable  # as for moments()
    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        y, count, mean, variance = _Normalise.apply(x, self.weight, self.bias, self.eps, self._collective)
        if self.running_mean is None or self.running_var is None or not self.track_running_stats:
            return y
        with torch.no_grad():
            share = self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked) if share is None else share
            share = 0.0 if share is None else share
            self.running_mean.mul_(1 - share).add_(mean, alpha=share)
            self.running_var.mul_(1 - share).add_(variance * (count / (count - 1)), alpha=share)  # unbiased
        return y


class _Normalise(torch.autograd.Function):
    """What torch's own layers do in training, with means over the samples of all ranks, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, name: str
    ) -> tuple[torch.Tensor, ...]:
        """Returns the normalised samples, and over all ranks each channel's number of values, mean and variance."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        count, mean, variance = _over_all_ranks(x.to(dtype), None, 1, name)
        if x.numel() <= x.shape[1] and bool((count <= 1).any()):  # on all ranks: else some has more values
            raise UsageError(
                f"BatchNorm in training was given {list(x.shape)} and on all ranks together one value a channel: give "
                "it at least two."
            )
        ctx.name, ctx.eps, ctx.affine = name, eps, [None if p is None else p.dtype for p in (weight, bias)]
        weight, bias, here, spread = (None if t is None else t.to(dtype) for t in (weight, bias, mean, variance))
        ctx.save_for_backward(x, weight, count, here, spread)
        ctx.mark_non_differentiable(count, mean, variance)
        y = functional.batch_norm(x, here, spread, weight, bias, training=False, eps=eps) if x.numel() else x.clone()
        return y, count, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """The gradients of samples, weight and bias; of the latter two this rank's share, which are averaged later."""
        x, weight, count, mean, variance = ctx.saved_tensors
        d_y, d_x, d_bias, d_weight = gradient.to(mean.dtype), x, torch.zeros_like(mean), torch.zeros_like(mean)
        if x.numel():  # without any, this operation of torch's divides by 0, which ends the process
            # As if mean and variance were constants; the rest of the samples' gradients is what comes through these.
            d_x, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                d_y, x.to(mean.dtype), weight, mean, variance, None, None, False, ctx.eps, [True] * 3
            )
        if ctx.needs_input_grad[0]:
            sums = all_reduce_sum(torch.cat([d_bias, d_weight]).double(), f"{ctx.name}.backward").view(2, -1)
            scale = torch.rsqrt(variance + ctx.eps)
            of_bias, of_weight = (sums / count).to(mean.dtype) * (scale if weight is None else scale * weight)
            through = (x - _along(1, mean, x)).mul_(_along(1, scale * of_weight, x)).add_(_along(1, of_bias, x))
            d_x = (d_x - through).to(x.dtype)
        return (
            d_x if ctx.needs_input_grad[0] else None,
            None if weight is None else d_weight.to(ctx.affine[0]),
            d_bias.to(ctx.affine[1]) if ctx.affine[1] else None,
            None,
            None,
        )


class _Moments(torch.autograd.Function):
    """Mean and variance over the samples of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mask: torch.Tensor | None, axis: int, name: str, epsilon: float
    ) -> tuple[torch.Tensor, ...]:
        count, mean, variance = _over_all_ranks(x, mask, axis, name, epsilon)
        mean, variance = mean.to(x.dtype), variance.to(x.dtype)
        ctx.save_for_backward(x, mask, count + epsilon, mean)
        ctx.axis, ctx.name = axis, name
        return mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_mean: torch.Tensor, d_variance: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mask, count, mean = ctx.saved_tensors
        sums = all_reduce_sum(torch.cat([d_mean, d_variance]).double(), f"{ctx.name}.backward")
        of_mean, of_variance = (sums.view(2, -1) / count).to(x.dtype)
        d_x = _along(ctx.axis, of_mean, x) + 2 * (x - _along(ctx.axis, mean, x)) * _along(ctx.axis, of_variance, x)
        return d_x if mask is None else torch.where(mask, d_x, 0), None, None, None, None


@torch.compiler.disable  # which can't hold other ranks' numbers
def moments(
    x: torch.Tensor, mask: torch.Tensor | None, axis: int, name: str, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel over the samples of all ranks, which call it together; differentiable.

    Args:
        x: this rank's samples, any number, float32 or float64.
        mask: bool, of x's shape: the values that count; None: all.
        axis: of the channels.
        name: names the operations, alike on all ranks.
        epsilon: added to the number of values.

    Returns:
        Both of shape (channels,) and x's dtype.
    """
    return _Moments.apply(x, mask, axis, name, epsilon)


def _over_all_ranks(
    x: torch.Tensor, mask: torch.Tensor | None, axis: int, name: str, epsilon: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The number of values of each channel, their mean and their variance: float64, shape (channels,)."""
    others = [i for i in range(x.dim()) if i != axis % x.dim()]
    if mask is None:
        channels = x.shape[axis]
        count = torch.full((channels,), float(x.numel() // channels), dtype=torch.float64, device=x.device)
        # What torch's own layers call, several times as fast as var_mean(), and refuses to do for no sample at all.
        both = torch.batch_norm_update_stats(x.movedim(axis, 1), None, None, 0.0) if x.numel() else (count, count)
        mean, variance = both[0].double(), both[1].double()
    else:
        count = mask.sum(others).double()
        at_least_one = count.clamp(min=1)
        mean = torch.where(mask, x, 0).sum(others).double() / at_least_one
        distances = torch.where(mask, x - _along(axis, mean.to(x.dtype), x), 0)
        variance = distances.square().sum(others).double() / at_least_one
    own = torch.cat([count, count * mean, count * (variance + mean.square())])
    count, total, squares = all_reduce_sum(own, f"{name}.forward").view(3, -1)
    mean = total / (count + epsilon)
    variance = (squares - 2 * mean * total + count * mean.square()) / (count + epsilon)
    return count, mean, variance.clamp(min=0)


def all_reduce_sum(vector: torch.Tensor, name: str) -> torch.Tensor:
    """The sum of a float64 vector over all ranks: by NCCL on a GPU, by MPI in this thread, or by Horovod."""
    if vector.device.type == "meta":  # Keras looks what shapes a model gives
        return vector
    ranks, on_gpu = _job.process_set(), vector.is_cuda and _job.reduces_on_gpu()
    wire = None if on_gpu else _job.mpi_wire(hvd, ranks)
    with watch.waiting(name):
        if wire is not None:
            return torch.from_numpy(wire.summed(vector.cpu().numpy())).to(vector.device)
        own = vector if on_gpu else vector.cpu()
        return hvd.allreduce(own, name=name, op=hvd.Sum, process_set=ranks).to(vector.device)


def _along(axis: int, channels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A number of each channel, in a shape that goes with the samples'."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return channels.view(shape)

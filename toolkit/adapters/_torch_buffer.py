"""The memory that torch gradients travel in, and whether they are finite."""

from __future__ import annotations

import cmath
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch

_LARGE = 2**17  # elements from which ways through memory take longer than calls of torch
_SMALL = 2**14  # elements up to which a copy takes less time than another call
_NUMPYS = torch.float32, torch.float64  # what numpy multiplies as fast as torch does
_FREE = 2  # references to a view that nobody has but its buffer: the list's, and getrefcount's own


class Buffer:
    """The gradients of one dtype on one device, one after the other, and after them what travels beside.

    Attributes:
        tensor: shape (n,).
        array: the same numbers, for numpy, whose calls take a fourth of the time that torch's take; None: on a GPU.
        control: what travels beside: the array's end; on a GPU a copy, which `send` and `receive` keep alike.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, places: list[int], parameters: list[torch.Tensor], extra: int
    ) -> None:
        self._places, self._parameters = places, [parameters[i] for i in places]
        self._elements = sum(p.numel() for p in self._parameters)
        self._dtype, self._device, self._extra = dtype, device, extra
        self._factor = 0.0, np.array(0.0)
        self._same_dtype = all(p.dtype == dtype for p in self._parameters)
        self._elsewhere = any(p.device != device for p in self._parameters)  # a GPU's, added up in the host's memory
        self.allocate()

    def allocate(self) -> None:
        """Take new memory; the old is theirs who hold it."""
        self.tensor = torch.zeros(self._elements + self._extra, dtype=self._dtype, device=self._device)
        self._numbers = self.tensor[: self._elements]
        self._views = self._cut()
        self.array = self.tensor.numpy() if self._device.type == "cpu" else None
        if self.array is None:  # pinned, so that the GPU fetches it without being waited for
            self._pinned = torch.zeros(self._extra, pin_memory=True)
            self.control = self._pinned.numpy()
        else:
            self.control = self.array[self._elements :]
        self._storage: int = self.tensor.untyped_storage()._cdata
        self._aliases = self._count_aliases()

    def _cut(self) -> list[torch.Tensor]:
        # In a function of its own: the parts must be gone where aliases are counted.
        parts = self._numbers.split([p.numel() for p in self._parameters])
        return [_shaped(part, p) for part, p in zip(parts, self._parameters, strict=True)]

    def holds(self, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Whether one of them, one a parameter, is a view of the buffer."""
        return any(g is view for g, view in zip(gradients, self._views, strict=True))

    def _count_aliases(self) -> int:
        return torch._C._storage_Use_Count(self._storage)

    def send(self) -> None:
        """Put `control` where the numbers are."""
        if self.array is None:
            self.tensor[self._elements :].copy_(self._pinned, non_blocking=True)

    def receive(self) -> None:
        """Get `control` from there."""
        if self.array is None:
            self.control[:] = self.tensor[self._elements :].tolist()

    def pack(self, gradients: Sequence[torch.Tensor | None], scale: float, check: bool) -> bool:
        """Fill the buffer with `scale` times this rank's gradients; say whether they are finite, where that is asked.

        A gradient that is a view of the buffer already, where nobody cleared it, is scaled in place.
        """
        own = [gradients[i] for i in self._places]
        if self._elsewhere:
            own = [None if g is None else g.to(self._device) for g in own]
        if self._is_held(own):
            self.allocate()
        if self._elements > _LARGE and self._same_dtype and self.array is not None:
            # One way through memory in place of two; a GPU has less to begin with a call for all.
            for view, g in zip(self._views, own, strict=True):
                view.zero_() if g is None else torch.mul(g.to_dense(), scale, out=view)
        else:
            have, dense = self._views, [g if g.layout is torch.strided else g.to_dense() for g in own if g is not None]
            if len(dense) < len(own):
                torch._foreach_zero_([view for view, g in zip(have, own, strict=True) if g is None])
                have = [view for view, g in zip(have, own, strict=True) if g is not None]
            if have:
                torch._foreach_copy_(have, dense)
            self._scale_by(scale)
        return not check or are_finite([self._numbers])

    def _scale_by(self, factor: float) -> None:
        if self.array is None or self._dtype not in _NUMPYS:
            self._numbers.mul_(factor)
        else:
            if self._factor[0] != factor:
                self._factor = factor, np.array(factor, self.array.dtype)  # numpy takes 5 us for it
            numbers = self.array[: self._elements]
            np.multiply(numbers, self._factor[1], out=numbers)

    def unpack(self, means: list[torch.Tensor | None]) -> None:
        """Put the means into their places in the list."""
        for i, view, parameter in zip(self._places, self._views, self._parameters, strict=True):
            as_is = self._same_dtype and not self._elsewhere
            means[i] = view if as_is else view.to(parameter.device, parameter.dtype)

    def _is_held(self, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Whether the last means, or other tensors and arrays of their memory, are held elsewhere than in `gradients`.

        Who kept them in one process, after `zero_grad()`, kept numbers that do not change.
        """
        if self._count_aliases() > self._aliases:
            return True
        counts = list(map(sys.getrefcount, self._views))
        if max(counts, default=0) <= _FREE:
            return False
        own = zip(counts, self._views, gradients, strict=True)
        return any(count > _FREE for count, view, g in own if g is not view)


def finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether each tensor's elements are all finite: bools on the first one's device, which is not waited for."""
    values = [t if t.numel() else t.new_zeros(1) for t in map(_values, tensors)]
    # The largest magnitude neither overflows, as a sum can, nor loses a NaN.
    largest = torch._foreach_norm(values, math.inf)
    return torch.stack([each.to(values[0].device) for each in largest]).isfinite()


def are_finite(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether every element of the tensors is finite."""
    have = [t for t in tensors if t is not None]
    if have and have[0].device.type != "cpu":
        return bool(finite(have).all())  # waits for the GPU once
    values = [_values(t) for t in have]
    # A sum is finite only where every element is; it takes a tenth of the time of looking at each.
    small = [v for v in values if v.numel() < _SMALL]
    if len(small) > 1 and cmath.isfinite(torch._utils._flatten_dense_tensors(small).sum().item()):
        values = [v for v in values if v.numel() >= _SMALL]
    return all(cmath.isfinite(v.sum().item()) or bool(v.isfinite().all()) for v in values)


def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _shaped(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A part of a buffer in a parameter's shape, and in its order of dimensions where that leaves no gaps."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return part.as_strided(parameter.shape, parameter.stride())
    return part.view(parameter.shape)

"""The mean of torch gradients over all ranks, for the torch adapter and for Keras on torch."""

from __future__ import annotations

import cmath
import operator
import sys
from collections.abc import Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from toolkit import watch
from toolkit.adapters import _job, _reduction
from toolkit.adapters._mpi import MpiWire
from toolkit.adapters._reduction import exchange

_LARGE = 2**17  # elements from which ways through memory take longer than calls of torch
_NUMPYS = torch.float32, torch.float64  # what numpy multiplies as fast as torch does
_FREE = 2  # references to a view that nobody has but its buffer: the list's, and getrefcount's own
_ELSEWHERE = -1


class GradientAverager(_reduction.Averager):
    """Averages an optimizer's gradients over all ranks, by one flat buffer for all of a dtype.

    The first buffer ends with what travels beside the gradients: which of them this rank has, and the rank's flag.
    Scaling by 1/size comes before the addition, so that the mean of finite gradients is finite, and that both
    reducers give the same bits.

    Attributes:
        broken: after a call, where `exchange.guarded` asks for it and a mean is not finite: the place of this rank's
            first gradient that is not, or -1; else None.
    """

    def __init__(self, name: str, compression: str, reducer: str) -> None:
        super().__init__(name, compression, reducer)
        self._parameters: Sequence[torch.Tensor] = []
        self._sparse: Sequence[int] = []
        self._buffers: list[_Buffer] = []
        self._wire: Any = None  # a `toolkit.compression.Wire`; None: Horovod adds up tensors
        self._ranks = _job.process_set()
        self._size: int = self._ranks.size()
        self._waiting = watch.waiting(name)
        self.broken: int | None = None

    def __call__(
        self,
        gradients: Sequence[torch.Tensor | None],
        parameters: Sequence[torch.Tensor],
        sparse: Sequence[bool] | None = None,
        passes: int = 1,
    ) -> list[torch.Tensor | None]:
        """The mean of each gradient over all ranks.

        A gradient missing (None) on some ranks counts as zero there; one missing on every rank stays None.

        Args:
            gradients: one per parameter, of its shape; bfloat16, which Horovod lacks, travels as float32.
            parameters: what the gradients belong to, alike on all ranks.
            sparse: which gradients are sparse tensors, alike on all ranks; None: none is.
            passes: backward passes that the gradients are the sum of: their mean is taken over these too.

        Returns:
            Views of the buffers, which are used again once nobody else holds them.
        """
        self.broken = None
        if not parameters:
            return []
        builds_graph = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # as no_grad() does, in a tenth of its time
        try:
            if self._size == 1:
                return self._alone(gradients, passes)
            if len(parameters) != len(self._parameters) or not all(map(operator.is_, parameters, self._parameters)):
                self._lay_out(list(parameters), sparse or [False] * len(parameters))
            return self._means(gradients, passes)
        finally:
            torch._C._set_grad_enabled(builds_graph)

    def _means(self, gradients: Sequence[torch.Tensor | None], passes: int) -> list[torch.Tensor | None]:
        share = 1.0 / (self._size * passes)
        scale = 1.0 / passes if self._compressor else share  # compression averages by itself
        finite = [buffer.pack(gradients, scale, exchange.guarded) for buffer in self._buffers]
        if exchange.guarded and not (all(finite) and are_finite([gradients[i] for i in self._sparse])):
            self.broken = next(i for i, g in enumerate(gradients) if not are_finite([g]))
        missing = [i for i, g in enumerate(gradients) if g is None]
        control = self._tell(missing)
        with self._waiting:
            self._add_up()
        self._hear()
        means: list[torch.Tensor | None] = [None] * len(gradients)
        for buffer in self._buffers:
            buffer.unpack(means)
        for i in self._sparse:
            means[i] = _average_sparse(gradients[i], self._parameters[i], share, f"{self._name}.sparse{i}")
        for i in missing:
            if control[i] == 0:  # on every rank
                means[i] = None
        return means

    def _tell(self, missing: list[int]) -> np.ndarray:
        """Fill in what travels beside the gradients: which of them this rank has, its flag, and whether one is broken.

        Returns:
            Where they are, and will be added up.
        """
        first = self._buffers[0]
        control = first.control
        control[:] = self._nothing
        if missing:
            control[missing] = 0
        if exchange.flag:
            control[-2] = 1
        if self.broken is not None:
            control[-1] = 1
        first.send()
        return control

    def _hear(self) -> None:
        """Note what all ranks' flags add up to."""
        first = self._buffers[0]
        first.receive()
        heard, broken = first.control[-2:].tolist()
        if exchange.guarded and self._compressor and not are_finite([first.tensor]):
            broken = 1  # a mean that overflowed
        if heard > 0:
            exchange.heard = True
        if broken > 0 and self.broken is None:
            self.broken = _ELSEWHERE

    def _alone(self, gradients: Sequence[torch.Tensor | None], passes: int) -> list[torch.Tensor | None]:
        exchange.heard |= exchange.flag
        if exchange.guarded and not are_finite(gradients):
            self.broken = next(i for i, g in enumerate(gradients) if not are_finite([g]))
        return [g if g is None or passes == 1 else g / passes for g in gradients]

    def _lay_out(self, parameters: list[torch.Tensor], sparse: Sequence[bool]) -> None:
        dense = [p for p, is_sparse in zip(parameters, sparse, strict=True) if not is_sparse]
        self._wire = self._choose(dense)
        if self.compression != "none":
            self._wire = self._wire or _HorovodWire(self._name, self._ranks)
        self._set_up([p.shape for p in dense], self._wire, len(parameters) + 2)
        places: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, p in enumerate(parameters):
            if not sparse[i]:
                device = dense[0].device if self._compressor else p.device
                device = device if self._adds_up_on_gpu() else torch.device("cpu")
                places.setdefault((self._wire_dtype(p.dtype), device), []).append(i)
        if not places:
            places[torch.float32, torch.device("cpu")] = []
        self._buffers = [
            _Buffer(dtype, device, found, parameters, len(parameters) + 2 if i == 0 else 0)
            for i, ((dtype, device), found) in enumerate(places.items())
        ]
        self._nothing = np.array([*[1] * len(parameters), 0, 0], np.float32)  # to tell but that gradients are there
        self._parameters, self._sparse = parameters, [i for i, is_sparse in enumerate(sparse) if is_sparse]

    def _choose(self, dense: list[torch.Tensor]) -> MpiWire | None:
        if self._adds_up_on_gpu() and any(p.device.type != "cpu" for p in dense):
            return None

        def by_horovod(numbers: np.ndarray) -> None:
            hvd.allreduce_(torch.from_numpy(numbers), name=f"{self._name}.trial", op=hvd.Sum, process_set=self._ranks)

        with watch.waiting(self._name):
            return _reduction.choose(self._reducer, hvd, by_horovod, sum(p.numel() for p in dense))

    def _wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self._compressor:
            return torch.float32
        # Horovod knows no bfloat16, and MPI no float16 either.
        narrow = (torch.bfloat16,) if self._wire is None else (torch.bfloat16, torch.float16)
        return torch.float32 if dtype in narrow else dtype

    def _add_up(self) -> None:
        if self._compressor:
            tensor = self._buffers[0].tensor
            array = tensor.cpu().numpy()  # on a CPU the tensor's own memory
            self._compressor.average(array, self._wire)
            if tensor.device.type != "cpu":
                tensor.copy_(torch.from_numpy(array))
            return
        if self._wire is not None:
            for buffer in self._buffers:
                self._wire.sum(buffer.array)
            return
        handles = [
            hvd.allreduce_async_(buffer.tensor, name=f"{self._name}.{i}", op=hvd.Sum, process_set=self._ranks)
            for i, buffer in enumerate(self._buffers)
        ]
        for handle in handles:
            hvd.synchronize(handle)


class _HorovodWire:
    """See `toolkit.compression.Wire`."""

    def __init__(self, name: str, ranks: Any) -> None:
        self._name, self._ranks = name, ranks
        self.rank: int = ranks.rank()
        self.size: int = ranks.size()

    def sum(self, array: np.ndarray) -> None:
        """See `toolkit.compression.Wire.sum`."""
        name = f"{self._name}.sum{array.size}"
        hvd.allreduce_(torch.from_numpy(array), name=name, op=hvd.Sum, process_set=self._ranks)

    def all_to_all(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_to_all`."""
        rows = hvd.alltoall(_bytes(send), name=f"{self._name}.all_to_all{send.nbytes}", process_set=self._ranks)
        _bytes(received).copy_(rows)

    def all_gather(self, send: np.ndarray, received: np.ndarray) -> None:
        """See `toolkit.compression.Wire.all_gather`."""
        rows = hvd.allgather(_bytes(send[None]), f"{self._name}.all_gather{send.nbytes}", self._ranks)
        _bytes(received).copy_(rows)


def _bytes(array: np.ndarray) -> torch.Tensor:
    """An array's rows as bytes of the same memory: Horovod knows few types."""
    return torch.from_numpy(array.reshape(len(array), -1).view(np.uint8))


class _Buffer:
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
        self._allocate()

    def _allocate(self) -> None:
        self.tensor = torch.zeros(self._elements + self._extra, dtype=self._dtype, device=self._device)
        self._numbers = self.tensor[: self._elements]
        self._views = self._cut()
        self.array = self.tensor.numpy() if self._device.type == "cpu" else None
        self.control = np.zeros(self._extra, np.float32) if self.array is None else self.array[self._elements :]
        self._storage: int = self.tensor.untyped_storage()._cdata
        self._aliases = self._count_aliases()

    def _cut(self) -> list[torch.Tensor]:
        # In a function of its own: the parts must be gone where aliases are counted.
        parts = self._numbers.split([p.numel() for p in self._parameters])
        return [_shaped(part, p) for part, p in zip(parts, self._parameters, strict=True)]

    def _count_aliases(self) -> int:
        return torch._C._storage_Use_Count(self._storage)

    def send(self) -> None:
        """Put `control` where the numbers are."""
        if self.array is None:
            self.tensor[self._elements :].copy_(torch.from_numpy(self.control))

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
            self._allocate()
        if self._elements > _LARGE and self._same_dtype:  # one way through memory in place of two
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


def are_finite(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether every element of the tensors is finite."""
    values = [t.coalesce().values() if t.is_sparse else t for t in tensors if t is not None]
    # A sum is finite only where every element is; it takes a tenth of the time of looking at each.
    return all(cmath.isfinite(v.sum().item()) or bool(v.isfinite().all()) for v in values)


def _shaped(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A part of a buffer in a parameter's shape, and in its order of dimensions where that leaves no gaps."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return part.as_strided(parameter.shape, parameter.stride())
    return part.view(parameter.shape)


def _average_sparse(gradient: torch.Tensor | None, parameter: torch.Tensor, scale: float, name: str) -> torch.Tensor:
    """The sum over all ranks of `scale` times a sparse COO gradient, by gathering every rank's rows."""
    if gradient is None:
        gradient = torch.zeros_like(parameter).to_sparse(1)
    gradient = gradient.coalesce()
    gradient = gradient if _job.reduces_on_gpu() else gradient.cpu()
    values = gradient.values().float() if gradient.dtype == torch.bfloat16 else gradient.values()
    # Horovod gathers along the first dimension, which may differ in length between ranks.
    ranks = _job.process_set()
    with watch.waiting(name):
        indices = hvd.allgather(gradient.indices().t().contiguous(), f"{name}.indices", ranks)
        values = hvd.allgather((values * scale).contiguous(), f"{name}.values", ranks)
    total = torch.sparse_coo_tensor(indices.t(), values, parameter.shape, check_invariants=True)
    return total.coalesce().to(parameter.device, parameter.dtype)

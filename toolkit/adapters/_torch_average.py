"""The mean of torch gradients over all ranks, for the torch adapter and for Keras on torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from toolkit import watch
from toolkit.adapters import _job, _reduction, _torch_ops
from toolkit.adapters._mpi import MpiWire
from toolkit.adapters._reduction import exchange
from toolkit.adapters._torch_buckets import ELSEWHERE, Buckets
from toolkit.adapters._torch_buffer import Buffer, are_finite


class GradientAverager(_reduction.Averager):
    """Averages an optimizer's gradients over all ranks, by one flat buffer for all of a dtype, or on GPUs by `Buckets`.

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
        self._buffers: list[Buffer] = []
        self._buckets: Buckets | None = None  # in place of the buffers
        self._came: dict[int, None] = {}  # the ids of parameters, in the order in which their gradients got ready
        self._wire: Any = None  # a `toolkit.compression.Wire`; None: Horovod adds up tensors
        self._ranks = _job.process_set()
        self._size: int = self._ranks.size()
        self._waiting = watch.waiting(name)
        self.broken: int | None = None

    def __call__(
        self,
        gradients: list[torch.Tensor | None],
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
            Views of the buffers, which are used again once nobody else holds them; the list of the gradients itself
            where they are their mean.
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
            if self._buckets is not None:
                return self._through_buckets(self._buckets, gradients, passes)
            return self._means(gradients, passes)
        finally:
            torch._C._set_grad_enabled(builds_graph)

    @property
    def is_alone(self) -> bool:
        """Whether there is one worker, whose gradients are their mean."""
        return self._size == 1

    @property
    def overlaps(self) -> bool:
        """Whether gradients may travel while the backward pass goes on, if `ready` is told of them."""
        return self._size > 1 and self.compression == "none" and self._adds_up_on_gpu()

    def ready(self, parameter: torch.Tensor, passes: int, send: bool) -> None:
        """Note that a gradient is there.

        Args:
            parameter: whose `grad` it is.
            passes: backward passes that the gradients will be the sum of.
            send: it is what the next call will be about, and may travel.
        """
        self._came[id(parameter)] = None
        if send and self._buckets is not None:
            self._buckets.ready(parameter, 1.0 / (self._size * passes))

    def _through_buckets(
        self, buckets: Buckets, gradients: Sequence[torch.Tensor | None], passes: int
    ) -> list[torch.Tensor | None]:
        share = 1.0 / (self._size * passes)
        means, self.broken = buckets.average(gradients, share)
        for i in self._sparse:
            mean = _average_sparse(gradients[i], self._parameters[i], share, f"{self._name}.sparse{i}")
            means[i] = None if i in buckets.absent else mean
        self._came.clear()
        return means

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
            self.broken = ELSEWHERE

    def _alone(self, gradients: list[torch.Tensor | None], passes: int) -> list[torch.Tensor | None]:
        exchange.heard |= exchange.flag
        if exchange.guarded and not are_finite(gradients):
            self.broken = next(i for i, g in enumerate(gradients) if not are_finite([g]))
        return gradients if passes == 1 else [g if g is None else g / passes for g in gradients]

    def _lay_out(self, parameters: list[torch.Tensor], sparse: Sequence[bool]) -> None:
        if self._buckets is not None:
            self._buckets.drain()  # on every rank: some may have sent what others have not
        dense = [p for p, is_sparse in zip(parameters, sparse, strict=True) if not is_sparse]
        self._wire = self._choose(dense, any(sparse))
        if self.compression != "none":
            self._wire = self._wire or _HorovodWire(self._name, self._ranks)
        self._set_up([p.shape for p in dense], self._wire, len(parameters) + 2)
        self._parameters, self._sparse = parameters, [i for i, is_sparse in enumerate(sparse) if is_sparse]
        if self.overlaps and self._wire is None:
            order = self._agreed_order(parameters)
            self._buckets = Buckets(self._name, self._ranks, parameters, self._sparse, order, self._wire_dtype)
            return
        places: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, p in enumerate(parameters):
            if not sparse[i]:
                device = dense[0].device if self._compressor else p.device
                device = device if self._adds_up_on_gpu() else torch.device("cpu")
                places.setdefault((self._wire_dtype(p.dtype), device), []).append(i)
        if not places:
            places[torch.float32, torch.device("cpu")] = []
        self._buffers = [
            Buffer(dtype, device, found, parameters, len(parameters) + 2 if i == 0 else 0)
            for i, ((dtype, device), found) in enumerate(places.items())
        ]
        self._nothing = np.array([*[1] * len(parameters), 0, 0], np.float32)  # to tell but that gradients are there

    def _agreed_order(self, parameters: list[torch.Tensor]) -> list[int]:
        """The places of parameters as gradients got ready on rank 0; then of those that got none, from the end.

        With `deterministic` all are from the end.
        """

        def gather(value: Any) -> list[Any]:
            return _torch_ops.gather(value, self._ranks)

        _reduction.check_alike(tuple(tuple(p.shape) for p in parameters), gather)
        place = {id(p): i for i, p in enumerate(parameters)}
        # A resumed run's first pass may bring them in another order.
        came = [] if torch.are_deterministic_algorithms_enabled() else [place[k] for k in self._came if k in place]
        return gather(came + [i for i in reversed(range(len(parameters))) if i not in set(came)])[0]

    def _choose(self, dense: list[torch.Tensor], gathers_rows: bool) -> MpiWire | None:
        if self._adds_up_on_gpu() and any(p.device.type != "cpu" for p in dense):
            _job.keep_quick(hvd)
            self.reducer = "horovod"
            return None

        def by_horovod(numbers: np.ndarray) -> None:
            hvd.allreduce_(torch.from_numpy(numbers), name=f"{self._name}.trial", op=hvd.Sum, process_set=self._ranks)

        with watch.waiting(self._name):
            return self._decide(hvd, by_horovod, sum(p.numel() for p in dense), gathers_rows)

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


def _average_sparse(gradient: torch.Tensor | None, parameter: torch.Tensor, scale: float, name: str) -> torch.Tensor:
    """The sum over all ranks of `scale` times a sparse COO gradient, by gathering every rank's rows."""
    _job.keep_quick(hvd)  # also where the dense gradients beside it are added up by MPI
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

"""Torch gradients that travel in buckets while the backward pass goes on, where they are added up on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from toolkit import watch
from toolkit.adapters._reduction import exchange
from toolkit.adapters._torch_buffer import Buffer, finite

ELSEWHERE = -1  # where a gradient is not finite: on another rank
BYTES = 25 * 2**20  # of a bucket, about; what torch's DistributedDataParallel takes
_EXTRA = 3  # numbers beside those that tell which gradients a rank has


class Buckets:
    """The gradients of an optimizer, cut into buckets, and what travels beside them.

    `ready` sends a bucket as soon as all of its gradients are there; `average` sends the others and, last, what travels
    beside. Horovod matches what the ranks send by name, so each may send its buckets in an order of its own.

    A rank's own gradients stay as they are until `average` is done: where one was changed after its bucket was sent
    (a parameter that a re-entrant backward pass reaches twice, a hook of the user's, a backward pass that failed), that
    travels beside, and all ranks send all of their buckets once more. Changes by way of `.data`, which torch does not
    count, are not noticed.

    On a GPU everything is in order by the stream that is current when a gradient gets ready, which is the forward
    pass's: the copy into the bucket is put on it behind the gradient, Horovod marks there, when it is given the bucket,
    what NCCL's stream waits for, and `hvd.synchronize` returns when NCCL is done (unless the user has set Horovod's
    HOROVOD_ENABLE_ASYNC_COMPLETION: then the default stream waits, and the loop must be on that one). A bucket whose
    gradients come on several streams is left to `average`, where torch has made the caller's wait for all.

    Args:
        name: of the collective operations, alike on all ranks.
        ranks: the Horovod process set.
        parameters: alike on all ranks.
        sparse: the places of those whose gradients are sparse tensors and travel elsewhere.
        order: the places of all in the order in which their gradients get ready, alike on all ranks.
        wire_dtype: the type in which a parameter's travels.

    Attributes:
        absent: after `average`, the places of gradients that no rank has.
    """

    def __init__(
        self,
        name: str,
        ranks: Any,
        parameters: list[torch.Tensor],
        sparse: Sequence[int],
        order: Sequence[int],
        wire_dtype: Callable[[torch.dtype], torch.dtype],
    ) -> None:
        self._waiting = watch.waiting(name)
        self._buckets = [
            Bucket(f"{name}.{number}", ranks, dtype, places, [parameters[i] for i in places])
            for number, (dtype, places) in enumerate(_cut(parameters, set(sparse), order, wire_dtype))
        ]
        self._of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        device = self._buckets[0].parameters[0].device if self._buckets else torch.device("cpu")
        self._beside = Buffer(torch.float32, device, [], [], len(parameters) + _EXTRA)
        self._send_beside = _Sender(f"{name}.beside", ranks)
        self._nothing = np.array([1] * len(parameters) + [0] * _EXTRA, np.float32)  # to tell but that all are there
        self.absent: list[int] = []

    def ready(self, parameter: torch.Tensor, scale: float) -> None:
        """Note that a gradient is there, in `parameter.grad`, and send its bucket if it was the last one of it.

        Args:
            parameter: any; one whose gradients are not in a bucket is left alone.
            scale: what the gradients are multiplied by before they are added up.
        """
        bucket = self._of.get(id(parameter))
        if bucket is not None:
            bucket.ready(parameter, scale)

    def average(
        self, gradients: Sequence[torch.Tensor | None], scale: float
    ) -> tuple[list[torch.Tensor | None], int | None]:
        """The sums over all ranks of `scale` times each gradient, and where they are not finite.

        Args:
            gradients: one per parameter, or None: those of `parameter.grad` where `ready` was called.
            scale: as in `ready`.

        Returns:
            A sum per parameter, None where no rank has a gradient, or it is sparse; and, where `exchange.guarded` asks
            for it and a gradient on any rank is not finite, the place of this rank's first, or `ELSEWHERE`; else None.
        """
        sums: list[torch.Tensor | None] = [None] * len(gradients)
        with self._waiting:
            while True:
                again, broken = self._add_up(gradients, scale)
                if not again:
                    break
        for bucket in self._buckets:
            bucket.unpack(sums)
        for i in self.absent:
            sums[i] = None
        return sums, broken

    def drain(self) -> None:
        """Send what was not sent, whatever it holds, and wait for all; every rank does it before it forgets these."""
        with self._waiting:
            for bucket in self._buckets:
                bucket.drain()

    def _add_up(self, gradients: Sequence[torch.Tensor | None], scale: float) -> tuple[bool, int | None]:
        """Send all that is still to be sent and wait for it.

        Returns:
            Whether all is to be sent once more; and where gradients are not finite, as `average` has it.
        """
        changed = False
        for bucket in self._buckets:
            own = [gradients[i] for i in bucket.places]
            if not bucket.is_sent:
                bucket.send(own, scale)
            elif not bucket.is_as_sent(own, scale):
                changed = True
        have = [i for i, g in enumerate(gradients) if g is not None]
        are = finite([g for g in gradients if g is not None]) if have and exchange.guarded else None
        beside = self._tell(gradients, changed, are)
        for bucket in self._buckets:
            bucket.wait()
        self._send_beside.wait()
        beside.receive()  # the one place where a GPU is waited for
        heard, again, broken = beside.control[-_EXTRA:].tolist()
        self.absent = np.flatnonzero(beside.control[:-_EXTRA] == 0).tolist()
        exchange.heard |= heard > 0
        if broken == 0 or are is None:
            return again > 0, ELSEWHERE if broken else None
        return again > 0, next((i for i, is_finite in zip(have, are.tolist(), strict=True) if not is_finite), ELSEWHERE)

    def _tell(self, gradients: Sequence[torch.Tensor | None], changed: bool, are: torch.Tensor | None) -> Buffer:
        """Send which gradients this rank has, its flag, whether all is to be sent again, and whether one is broken."""
        beside = self._beside
        beside.control[:] = self._nothing
        beside.control[[i for i, g in enumerate(gradients) if g is None]] = 0
        beside.control[-_EXTRA:] = exchange.flag, changed, 0
        beside.send()
        if are is not None:
            beside.tensor[-1:].copy_(~are.all())  # on the GPU, which is not waited for
        self._send_beside(beside.tensor)
        return beside


class Bucket:
    """Some gradients of one type on one device, in one buffer.

    Attributes:
        places: of its parameters among all.
        parameters: whose gradients they are.
    """

    def __init__(
        self, name: str, ranks: Any, dtype: torch.dtype, places: list[int], parameters: list[torch.Tensor]
    ) -> None:
        self.places, self.parameters = places, parameters
        self._buffer = Buffer(dtype, parameters[0].device, list(range(len(places))), parameters, 0)
        self._send = _Sender(name, ranks)
        self._all = frozenset(map(id, parameters))
        self._missing = set(self._all)  # ids of parameters whose gradients this pass has not brought yet
        self._sent: tuple[float, list[tuple[torch.Tensor | None, int]]] | None = None  # the scale; gradients, versions
        self._stream = _stream(parameters[0].device)

    @property
    def is_sent(self) -> bool:
        """Whether it is under way."""
        return self._sent is not None

    def ready(self, parameter: torch.Tensor, scale: float) -> None:
        """See `Buckets.ready`."""
        if _stream(parameter.device) == self._stream:
            self._missing.discard(id(parameter))
        if not self._missing and self._sent is None:
            self.send([p.grad for p in self.parameters], scale)

    def send(self, gradients: Sequence[torch.Tensor | None], scale: float) -> None:
        """Put the gradients, which stay as they are, into the buffer, and send it."""
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # create_graph=True has it on
        try:
            if self._buffer.holds(gradients):
                self._buffer.allocate()
            self._buffer.pack(gradients, scale, False)
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        self._sent = scale, [(g, 0 if g is None else g._version) for g in gradients]
        self._send(self._buffer.tensor)

    def is_as_sent(self, gradients: Sequence[torch.Tensor | None], scale: float) -> bool:
        """Whether these are what was sent."""
        if self._sent is None or self._sent[0] != scale:
            return False
        pairs = zip(gradients, self._sent[1], strict=True)
        return all(g is sent and (g is None or g._version == version) for g, (sent, version) in pairs)

    def wait(self) -> None:
        """Wait for what was sent; the next pass begins anew."""
        self._send.wait()
        self._sent = None
        self._missing |= self._all
        self._stream = _stream(self.parameters[0].device)

    def drain(self) -> None:
        """See `Buckets.drain`."""
        if self._sent is None:
            self._buffer.allocate()  # in the old one are gradients that somebody holds
            self._send(self._buffer.tensor)
        self.wait()

    def unpack(self, sums: list[torch.Tensor | None]) -> None:
        """Put the sums into their places among all."""
        own: list[torch.Tensor | None] = [None] * len(self.places)
        self._buffer.unpack(own)
        for i, each in zip(self.places, own, strict=True):
            sums[i] = each


class _Sender:
    """Adds up a tensor over all ranks, in place, by Horovod in the background."""

    def __init__(self, name: str, ranks: Any) -> None:
        self._name, self._ranks, self._handle = name, ranks, -1

    def __call__(self, tensor: torch.Tensor) -> None:
        self._handle = hvd.allreduce_async_(tensor, name=self._name, op=hvd.Sum, process_set=self._ranks)

    def wait(self) -> None:
        """Wait for it; on a GPU the current stream may go on with the sum."""
        hvd.synchronize(self._handle)


def _cut(
    parameters: Sequence[torch.Tensor],
    sparse: set[int],
    order: Sequence[int],
    wire_dtype: Callable[[torch.dtype], torch.dtype],
) -> list[tuple[torch.dtype, list[int]]]:
    """Which gradients go together: those of one type on one device that get ready one after the other."""
    cut: list[tuple[torch.dtype, list[int]]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for i in order:
        if i in sparse:
            continue
        dtype, device = wire_dtype(parameters[i].dtype), parameters[i].device
        places, filled = filling.get((dtype, device), ([], BYTES))
        if filled >= BYTES:
            places, filled = [], 0
            cut.append((dtype, places))
        places.append(i)
        filling[dtype, device] = places, filled + parameters[i].numel() * dtype.itemsize
    return cut


def _stream(device: torch.device) -> int:
    """The GPU's current stream, as a number; 0 on a CPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0

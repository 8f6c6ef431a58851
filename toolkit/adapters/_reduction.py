"""The averaging of gradients above the framework: which reducer adds them up, and what travels beside them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit import compression as compressors
from toolkit.adapters import _job, _shared
from toolkit.adapters._mpi import MpiWire
from toolkit.compression import Compressor
from toolkit.errors import UsageError
from toolkit.progress import say

_PREFIX = "compression/"
_ROUNDS = 10  # of the measurement behind "auto"
_MEASURED = 2**20  # elements that it adds up at most: beyond, both take the time that the bytes take


@dataclass
class Exchange:
    """What travels beside the gradients; see `toolkit.adapters.Adapter.exchange_flag`."""

    flag: bool = False
    heard: bool = False
    broken: str | None = None
    guarded: bool = False


exchange = Exchange()


def exchange_flag(flag: bool | None) -> tuple[bool, str | None]:
    """See `toolkit.adapters.Adapter.exchange_flag`."""
    heard, broken = exchange.heard, exchange.broken
    exchange.flag, exchange.heard, exchange.broken, exchange.guarded = bool(flag), False, None, flag is not None
    return heard, broken


def leave_out(broken: str) -> None:
    """Note that a step was left out: the first of this rank's gradients that was not finite, or ""."""
    if exchange.broken is None:
        exchange.broken = broken


class Averager:
    """What the frameworks' averagers of gradients have alike.

    Args:
        name: names the collective operations, alike on all ranks, and is used for nothing else.
        compression: see `toolkit.compression.make`.
        reducer: one of `toolkit.options.REDUCERS`.

    Attributes:
        reducer: who adds up, "horovod" or "mpi", once it is decided; or what a checkpoint tells, for "auto" to take.
    """

    def __init__(self, name: str, compression: str, reducer: str) -> None:
        self._name, self.compression, self._asked = name, compression, reducer
        self.reducer: str | None = None
        self._shapes: tuple[tuple[int, ...], ...] | None = None
        self._compressor: Compressor | None = None  # None: not yet made, or there is none
        self._state: Mapping[str, np.ndarray] = {}  # for it, from a checkpoint

    def _set_up(self, shapes: Sequence[Sequence[int]], wire: Any, extra: int) -> None:
        """Make the compressor for gradients of these shapes, where there is to be one; with `-v`, say what travels.

        Where the gradients come to be others, what it carries from step to step begins anew.
        """
        key = tuple(map(tuple, shapes))
        if key == self._shapes:
            return
        if isinstance(wire, MpiWire):  # Horovod sees to it by itself
            check_alike(key, wire.gather)
        first, self._shapes = self._shapes is None, key
        size = _job.process_set().size()
        plain = sent = compressors.make("none", shapes, extra).bytes_per_step(size)
        if self.compression != "none":
            self._compressor = compressors.make(self.compression, shapes, extra)
            if first and self._state:
                self._compressor.load_state(self._state)
            sent = self._compressor.bytes_per_step(size)
        share = f", {100 * sent / plain:.3g} % of what it is uncompressed" if self._compressor else ""
        by = "mpi" if isinstance(wire, MpiWire) else "horovod"
        _job.explain(f"tuning: a worker sends {sent:,} bytes of gradients a step, by {by}{share}")

    def _adds_up_on_gpu(self) -> bool:
        """Whether a GPU's gradients are added up there; else in the host's memory, by whom it is done on a CPU."""
        return _job.reduces_on_gpu() and _demanded(self._asked) != "mpi"

    def _decide(
        self, hvd: Any, by_horovod: Callable[[np.ndarray], None], elements: int, gathers_rows: bool
    ) -> MpiWire | None:
        """`choose`, with what was decided before."""
        wire = choose(self._asked, hvd, by_horovod, elements, gathers_rows, self.reducer)
        self.reducer = "horovod" if wire is None else "mpi"
        return wire

    def state(self) -> dict[str, np.ndarray]:
        """What the compression carries from step to step on this rank, by names that begin with `compression/`."""
        found = self._compressor.state() if self._compressor else self._state
        return {f"{_PREFIX}{name}": array for name, array in found.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Put back what `state` gave, at the latest when the first gradients are there."""
        own = {name.removeprefix(_PREFIX): array for name, array in state.items() if name.startswith(_PREFIX)}
        if self._compressor:
            self._compressor.load_state(own)
        self._state = own


def check_alike(shapes: tuple[tuple[int, ...], ...], gather: Callable[[Any], list[Any]]) -> None:
    """Raise `UsageError`, on every rank, where the ranks' gradients are not of the same shapes.

    Args:
        shapes: of this rank's.
        gather: every rank's value.
    """
    found = gather(hashlib.blake2b(repr(shapes).encode(), digest_size=8).digest())
    others = [rank for rank, digest in enumerate(found) if digest != found[0]]
    if others:
        raise UsageError(
            f"the parameters of rank {others[0]} have other shapes, or another order, than rank 0's: build the same "
            "model and optimizer on every rank."
        )


def without_compression(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `Averager.state` has no part in."""
    return {name: array for name, array in state.items() if not name.startswith(_PREFIX)}


def choose(
    reducer: str,
    hvd: Any,
    by_horovod: Callable[[np.ndarray], None],
    elements: int,
    gathers_rows: bool = False,
    before: str | None = None,
) -> MpiWire | None:
    """Decide who adds up an optimizer's gradients; all ranks of a group call it together.

    Args:
        reducer: one of `toolkit.options.REDUCERS`; for "auto" the environment's HVDKIT_REDUCER counts, if it is set.
        hvd: `horovod.torch` or `horovod.tensorflow`.
        by_horovod: replaces a float32 vector by its sum over all ranks, through Horovod.
        elements: the number of gradients.
        gathers_rows: whether there are sparse gradients, whose rows Horovod gathers.
        before: who added them up until here, in this run; None: nobody did.

    Returns:
        The wire for MPI, which adds up in the host's memory, or None for Horovod; the same on all ranks. "auto" takes
        Horovod for what it adds up on GPUs; else the one from before, as from 3 ranks on the other may round otherwise;
        Horovod where it gathers rows; with `deterministic` MPI, which needs no thread of its own; else the one that was
        faster when both were tried with so many numbers, each with the cycle of Horovod's that suits it.

    Raises:
        UsageError: "mpi" without MPI, unless that was found by `hvdkit tune`; then it is Horovod.
    """
    demanded = _demanded(reducer)
    if demanded is not None:
        reducer = demanded
    elif before is None:  # what `hvdkit tune` has found since does not count
        reducer = os.environ.get("HVDKIT_REDUCER", "auto")
        _shared.check_reducer(reducer)
    ranks = _job.process_set()
    wire = None if reducer == "horovod" else _job.mpi_wire(hvd, ranks)
    if wire is None and demanded == "mpi":
        raise UsageError(
            'reducer="mpi" needs workers that were started by MPI, and mpi4py: start them with mpirun, or horovodrun '
            'without --gloo, or use reducer="horovod".'
        )
    if reducer == "auto":
        reducer = _without_trial(wire, gathers_rows, before, tells=ranks.rank() == 0)
    if reducer == "horovod":
        _job.keep_quick(hvd)
        return None
    if wire is None or wire.size == 1:
        return wire
    if reducer == "mpi":
        _job.restart_horovod(hvd, "slow")
        return wire
    numbers = np.zeros(min(max(1, elements), _MEASURED), np.float32)
    _job.restart_horovod(hvd, "fast")
    horovods = _seconds(by_horovod, numbers)
    _job.restart_horovod(hvd, "slow")
    seconds = np.array([_seconds(wire.sum, numbers), horovods])
    wire.sum(seconds)  # so that all ranks decide alike
    mpis, horovods = 1000 * seconds / wire.size
    _job.explain(
        f"tuning: {numbers.size:,} numbers were added up in {mpis:.3g} ms by mpi, in {horovods:.3g} ms by horovod"
    )
    if mpis <= horovods:
        return wire
    _job.keep_quick(hvd)
    return None


def _demanded(reducer: str) -> str | None:
    """Who has to add up, by the argument or the user's environment; None: neither asks for one of the two."""
    if reducer == "auto" and _job.is_users("HVDKIT_REDUCER"):
        reducer = os.environ["HVDKIT_REDUCER"]
        _shared.check_reducer(reducer)
    return None if reducer == "auto" else reducer


def _without_trial(wire: MpiWire | None, gathers_rows: bool, before: str | None, tells: bool) -> str:
    """Whom "auto" takes without trying both; "auto": nobody.

    Args:
        wire: for MPI; None: there is none.
        gathers_rows: see `choose`.
        before: likewise.
        tells: this rank is the one that says that the one from before can't go on.
    """
    if wire is None or _job.reduces_on_gpu():
        if before == "mpi" and tells:
            say(
                "the gradients of this run were added up by mpi until here, and from here on by horovod, so their last "
                "bits may differ from the uninterrupted run's: resume it with the launcher and device of its start for "
                "the same bits."
            )
        return "horovod"
    if before is not None:
        return before
    if gathers_rows:
        return "horovod"
    if _job.is_deterministic():
        _job.explain("tuning: the gradients are added up by mpi, without a trial of both: the run is deterministic")
        return "mpi"
    return "auto"


def _seconds(add_up: Callable[[np.ndarray], None], numbers: np.ndarray) -> float:
    """The least time of some additions, after a first one that makes connections.

    They are over in less than a turn on a core: with medians, a start in which another process had it, or Horovod's own
    thread, took Horovod for the quicker one where MPI took a tenth of its time.
    """
    took = []
    for _ in range(_ROUNDS + 1):
        began = time.perf_counter()
        add_up(numbers)
        took.append(time.perf_counter() - began)
    return min(took[1:])

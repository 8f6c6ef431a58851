"""What travels of the gradients under each compression, and what that costs to exchange.

Sources: Dettmers, arXiv:1511.04561 (8 bits a value); Lin et al., arXiv:1712.01887 (top-k); Vogels, Karimireddy, Jaggi,
arXiv:1905.13727 (PowerSGD).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.compression import NAMES, make
from toolkit.errors import UsageError
from toolkit.plan.cost import ALL_REDUCES, Cost, Links, all_gather, all_to_all

VALUE = 4  # bytes of a float32
SCHEMES = NAMES


@dataclass(frozen=True)
class Gradients:
    """The gradients of a step.

    Attributes:
        size: bytes of all, as float32.
        shapes: of each; None: not known.
    """

    size: float
    shapes: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]]) -> Gradients:
        """Gradients of these shapes."""
        return cls(VALUE * sum(math.prod(shape) for shape in shapes), tuple(map(tuple, shapes)))


@functools.cache
def _size(scheme: str, shapes: tuple[tuple[int, ...], ...]) -> int:
    """What a worker of two sends: of a sum 2(p − 1)/p, of shares and means together as much, to all others p − 1."""
    return make(scheme, shapes).bytes_per_step(2)


@dataclass(frozen=True)
class Compression:
    """One way of making the gradients fewer bytes.

    Attributes:
        name: one of `SCHEMES`.
        seconds: what it costs a worker a step to compress and decompress; None: not known, counted as 0.
        share: of the values that top-k sends, over 0 to 1.
        rank: PowerSGD's, ≥ 1.

    Raises:
        UsageError: the share or the rank is not that.
    """

    name: str = "none"
    seconds: float | None = None
    share: float = 0.01
    rank: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"--top-k is {self.share:g}: give the share of the values that travel, over 0 to 1.")
        if self.rank < 1:
            raise UsageError(f"--powersgd-rank is {self.rank}: give 1 or more.")

    @property
    def spelled(self) -> str:
        """As `compression.make` takes it."""
        arguments = {"topk": f":{self.share:.12g}", "powersgd": f":{self.rank}"}
        return self.name + arguments.get(self.name, "")

    def size(self, gradients: Gradients) -> float | None:
        """Bytes that stand for the gradients of one worker; None: their shapes would have to be known.

        Where they are, as the scheme itself tells it. Else halves for fp16 and bf16; a byte a value for int8; a value
        and its int32 place for each that top-k sends.
        """
        if gradients.shapes is not None:
            return _size(self.spelled, gradients.shapes)
        factors = {"none": 1, "fp16": 1 / 2, "bf16": 1 / 2, "int8": 1 / 4, "topk": 2 * self.share}
        return gradients.size * factors[self.name] if self.name in factors else None

    def exchange(self, all_reduce: str, links: Links, workers: int, size: float) -> Cost | None:
        """Until every worker has the mean, without compressing; None: the all-reduce is none for these workers.

        What is summed as it travels is all-reduced: PowerSGD in two operations, as its second factor needs the mean of
        the first. 16 and 8 bits are not summed: each worker sums one part of all in float32, from all the others, and
        the sums are gathered. top-k's places differ between workers, so each gets those of all: bytes grow with them.

        Args:
            all_reduce: a key of `cost.ALL_REDUCES`; fp16, bf16, int8 and top-k do without.
            size: bytes, as `size` has it, or of a part of the gradients.
        """
        if workers == 1:
            return Cost(0.0, self.name)
        agreement = links.agreement(workers)
        if self.name in ("fp16", "bf16", "int8"):
            seconds = all_to_all(links, workers, size) + all_gather(links, workers, size / workers)
            return Cost(2 * agreement + seconds, "all-to-all, all-gather")
        if self.name == "topk":
            return Cost(agreement + all_gather(links, workers, size), "all-gather")
        operations = 2 if self.name == "powersgd" else 1
        cost = ALL_REDUCES[all_reduce](links, workers, size / operations)
        return cost and Cost(operations * (agreement + cost.seconds), cost.algorithm)

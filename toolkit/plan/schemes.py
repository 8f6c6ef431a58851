"""What travels of the gradients under each compression, and what that costs to exchange.

Sources: Dettmers, arXiv:1511.04561 (8 bits a value); Lin et al., arXiv:1712.01887 (top-k); Vogels, Karimireddy, Jaggi,
arXiv:1905.13727 (PowerSGD).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.errors import UsageError
from toolkit.plan.cost import ALL_REDUCES, Cost, Links, all_gather, all_to_all

VALUE = 4  # bytes of a float32
SCHEMES = ("none", "fp16", "bf16", "int8", "topk", "powersgd")


@dataclass(frozen=True)
class Gradients:
    """The gradients of a step.

    Attributes:
        size: bytes of all, as float32.
        shapes: of each; None: not known.
    """

    size: float
    shapes: Sequence[tuple[int, ...]] | None = None

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]]) -> Gradients:
        """Gradients of these shapes."""
        return cls(VALUE * sum(math.prod(shape) for shape in shapes), shapes)


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

    def size(self, gradients: Gradients) -> float | None:
        """Bytes that stand for the gradients of one worker; None: their shapes would have to be known.

        Halves for fp16 and bf16; a byte a value for int8, whose scales are few enough to leave out; a value and its
        int32 place for each that top-k sends; for PowerSGD r(a + b) values of each a × b matrix, a the first dimension,
        where that is less than the matrix, and other tensors whole.
        """
        if self.name == "topk":
            return 2 * gradients.size * self.share
        if self.name != "powersgd":
            return gradients.size / {"none": 1, "fp16": 2, "bf16": 2, "int8": 4}[self.name]
        if gradients.shapes is None:
            return None
        return VALUE * sum(self._values(shape) for shape in gradients.shapes)

    def _values(self, shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        if len(shape) < 2:
            return count
        return min(count, self.rank * (shape[0] + count // shape[0])) if count else 0

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

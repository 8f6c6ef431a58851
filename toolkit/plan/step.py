"""How long a step takes on many workers, and what of it the all-reduce can hide behind the backward pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from toolkit.errors import UsageError
from toolkit.plan.cost import ALL_REDUCES, Links
from toolkit.plan.schemes import Compression, Gradients

MOST_BUCKETS = 64
NEARLY = 1.01  # times the quickest number of buckets: for a hundredth of a step nobody cuts finer


@dataclass(frozen=True)
class Compute:
    """What one worker computes in a step, without any exchange: forward, backward, update.

    Attributes:
        seconds: for `samples` samples on one worker.
        samples: on one worker, ≥ 1.
        fixed: of these seconds, those that are the same for any number of samples.
        backward: share of the seconds in which gradients come into being, 0 to 1. By default 2/3: a backward pass
            has two matrix products for each of the forward pass.
        global_batch: samples of a step over all workers where that is kept as workers are added; None: each worker
            has `samples`.

    Raises:
        UsageError: one of them is not that.
    """

    seconds: float
    samples: int = 1
    fixed: float = 0.0
    backward: float = 2 / 3
    global_batch: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.backward <= 1:
            raise UsageError(f"--backward-share is {self.backward:g}: give the backward pass' share, 0 to 1.")
        if not 0 <= self.fixed <= self.seconds:
            raise UsageError(f"--fixed-ms is {self.fixed * 1e3:g}: give 0 to {self.seconds * 1e3:g}, all of the step.")

    def samples_of(self, workers: int) -> int:
        """Samples of the worker that has most."""
        return self.samples if self.global_batch is None else -(-self.global_batch // workers)

    def seconds_of(self, workers: int) -> float:
        """Seconds of the worker that has most samples: the others wait for it."""
        return self.fixed + (self.seconds - self.fixed) * self.samples_of(workers) / self.samples

    def samples_per_step(self, workers: int) -> int:
        """Samples of a step over all workers."""
        return self.samples * workers if self.global_batch is None else self.global_batch


@dataclass(frozen=True)
class Step:
    """A step on a number of workers, by one way.

    Attributes:
        workers: all.
        seconds: of the whole step.
        compute: of these, what a worker computes, compression included.
        all_reduce: a key of `cost.ALL_REDUCES`.
        algorithm: what exactly that is here.
        buckets: pieces that the gradients are reduced in, during the backward pass; 1: after it.
        compression: the scheme's name.
        samples_per_second: over all workers.
        efficiency: samples a second, over those of as many single workers; 0 to 1.
    """

    workers: int
    seconds: float
    compute: float
    all_reduce: str
    algorithm: str
    buckets: int
    compression: str
    samples_per_second: float
    efficiency: float


@dataclass(frozen=True)
class Training:
    """A training job, as far as its speed goes."""

    compute: Compute
    gradients: Gradients
    links: Links
    compressions: Sequence[Compression] = field(default_factory=lambda: (Compression(),))
    bucket: float | None = None  # bytes, where the user has fixed them

    def buckets(self) -> Sequence[int]:
        """Numbers of buckets to choose from where the all-reduce overlaps with the backward pass."""
        if self.bucket is not None:
            return (max(1, math.ceil(self.gradients.size / self.bucket)),)
        return tuple(1 << i for i in range(MOST_BUCKETS.bit_length()))

    def step(self, workers: int, all_reduce: str, compression: Compression, buckets: int = 1) -> Step | None:
        """One step; None: the way is none for these workers, or the compression needs shapes that are not known.

        Gradients come into being evenly over the backward pass and are reduced in equal buckets, one after another,
        each once it is whole. With t a bucket's time and B the backward pass', the last of k is done
        max(B/k + kt, B + t) after the backward pass has begun: either the first bucket's wait and then all exchanges
        in a row, or the whole pass and then the last one. That overlap costs the computation nothing is an assumption.
        """
        size = compression.size(self.gradients)
        if size is None:
            return None
        one = compression.exchange(all_reduce, self.links, workers, size / buckets)
        if one is None:
            return None
        compute, spent = self.compute.seconds_of(workers), (compression.seconds or 0.0) if workers > 1 else 0.0
        bucket = one.seconds + spent / buckets
        backward = self.compute.backward * compute
        last = max(backward / buckets + buckets * bucket, backward + bucket)
        seconds = compute - backward + last
        alone = self.compute.samples_per_step(1) / self.compute.seconds_of(1)
        speed = self.compute.samples_per_step(workers) / seconds
        return Step(
            workers=workers,
            seconds=seconds,
            compute=compute + spent,
            all_reduce=all_reduce,
            algorithm=one.algorithm,
            buckets=buckets,
            compression=compression.name,
            samples_per_second=speed,
            efficiency=speed / (workers * alone),
        )

    def best(
        self,
        workers: int,
        *,
        all_reduces: Sequence[str] = tuple(ALL_REDUCES),
        overlap: bool = False,
        compression: Compression | None = None,
    ) -> Step | None:
        """The quickest of all ways, without compression unless one is given; with the fewest buckets for nearly that.

        None where there is none: the compression needs shapes that are not known.
        """
        ways = (
            self.step(workers, all_reduce, compression or Compression(), buckets)
            for buckets in (self.buckets() if overlap else (1,))
            for all_reduce in all_reduces
        )
        found = [step for step in ways if step]
        quickest = min((step.seconds for step in found), default=0.0)
        near = [step for step in found if step.seconds <= quickest * (1 if self.bucket else NEARLY)]
        return min(near, key=lambda step: (step.buckets, step.seconds), default=None)

    def affordable(self, workers: int, compression: Compression) -> float | None:
        """Seconds a step that a compression may cost at most, where nothing overlaps, to pay; None: unknown bytes."""
        plain = self.best(workers)
        free = self.best(workers, compression=dataclasses.replace(compression, seconds=0.0))
        return plain.seconds - free.seconds if plain and free else None

    def pays_below(self, workers: int, compression: Compression) -> float:
        """Bits a second of a host's link below which a compression makes a step shorter, where nothing overlaps.

        Returns:
            0 where it does on no slow one, infinity where on any; those looked at are of 1 kbit/s to 10⁶ Gbit/s.
        """

        def pays(digits: float) -> bool:
            network = dataclasses.replace(self.links.network, seconds_per_byte=8 / 10**digits)
            there = dataclasses.replace(self, links=dataclasses.replace(self.links, network=network))
            most = there.affordable(workers, compression)
            return most is not None and most > (compression.seconds or 0.0)

        slow, fast = 3.0, 15.0
        if not pays(slow):
            return 0.0
        if pays(fast):
            return math.inf
        for _ in range(40):
            middle = (slow + fast) / 2
            slow, fast = (middle, fast) if pays(middle) else (slow, middle)
        return 10**slow


def worker_counts(workers_per_host: int, most: int) -> list[int]:
    """1, 2, 4 … up to a host's workers, then full hosts: 1, 2, 4 … of them, at most `most` workers."""
    within = [1 << i for i in range(workers_per_host.bit_length()) if 1 << i < workers_per_host]
    hosts = most // workers_per_host
    return [n for n in within if n <= most] + [workers_per_host << i for i in range(hosts.bit_length())]

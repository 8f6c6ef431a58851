"""What collective operations cost: the alpha-beta model, in which a message takes α seconds and β seconds a byte.

A worker sends and receives at the same time, one message of each. Workers stand host by host, `workers_per_host` on
each, and those of a host share its one link to the network; hosts are joined by a switch that is never the narrowest
place. What a reduction costs the processor is held to be within β, as a measured β has it.

Sources: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005 (the model,
recursive doubling, Rabenseifner's algorithm); Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters
of workstations", 2009 (the ring, and that no all-reduce sends less); Sergeev, Del Balso, arXiv:1802.05799 (Horovod
takes the ring); Mikami et al., arXiv:1811.05233, and Horovod's HOROVOD_HIERARCHICAL_ALLREDUCE (within hosts, then
between them).
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.errors import UsageError


@dataclass(frozen=True)
class Link:
    """A way from one worker to another.

    Attributes:
        latency: α, seconds from a message's start to its end without its bytes.
        seconds_per_byte: β.
        agreement: seconds in which two workers agree on an operation before its first message, as Horovod's do.
    """

    latency: float
    seconds_per_byte: float
    agreement: float = 0.0

    def seconds(self, size: float) -> float:
        """What a message of `size` bytes takes."""
        return self.latency + size * self.seconds_per_byte

    @classmethod
    def of(cls, latency: float, bits_per_second: float, agreement: float = 0.0) -> Link:
        """From a rate as it is on the network's label."""
        return cls(latency, 8 / bits_per_second, agreement)


@dataclass(frozen=True)
class Links:
    """The ways between all workers.

    Attributes:
        network: from a host to another; its rate is that of a host, for all workers there together.
        local: between workers of a host, for each of them.
        workers_per_host: ≥ 1.
    """

    network: Link
    local: Link
    workers_per_host: int = 1

    def agreement(self, workers: int) -> float:
        """Seconds until `workers` have agreed on an operation: as in a small all-reduce, in log₂ p rounds."""
        on_host, hosts = self.split(workers)
        return _rounds(on_host) * self.local.agreement + _rounds(hosts) * self.network.agreement

    def split(self, workers: int) -> tuple[int, int]:
        """Workers on a host, and hosts.

        Raises:
            UsageError: the last host would be partly filled.
        """
        on_host = min(workers, self.workers_per_host)
        if workers % on_host:
            raise UsageError(
                f"{workers} workers do not fill hosts of {on_host}: give multiples of {on_host}, or fewer than that."
            )
        return on_host, workers // on_host


@dataclass(frozen=True)
class Cost:
    """Seconds of an operation, and the algorithm's name where several were to choose from."""

    seconds: float
    algorithm: str


def _rounds(workers: int) -> int:
    """⌈log₂ workers⌉."""
    return (workers - 1).bit_length()


def _is_power_of_2(number: int) -> bool:
    return number & (number - 1) == 0


def ring(links: Links, workers: int, size: float) -> Cost:
    """Ring all-reduce of `size` bytes: 2(p − 1)(α + n/p · β), α and β of the slowest link that the ring has.

    Between hosts it goes by one worker of each, so that a host's link carries one message at a time each way.
    """
    on_host, hosts = links.split(workers)
    if workers == 1:
        return Cost(0.0, "ring")
    part = size / workers
    used = [links.local] * (on_host > 1) + [links.network] * (hosts > 1)
    return Cost(2 * (workers - 1) * max(link.seconds(part) for link in used), "ring")


def recursive_doubling(links: Links, workers: int, size: float) -> Cost | None:
    """Recursive doubling: log₂ p (α + nβ), in each round with a partner twice as far.

    Rounds between hosts are of all the workers of a host at once, and share its link. With p between powers of two, the
    surplus workers hand in what they have before, and are told the sum after: two messages more. None: not counted
    here, as surplus workers would share hosts with others.
    """
    on_host, hosts = links.split(workers)
    if not _is_power_of_2(on_host) or (on_host > 1 and not _is_power_of_2(hosts)):
        return None
    near, far = on_host.bit_length() - 1, hosts.bit_length() - 1
    surplus = 0 if _is_power_of_2(hosts) else 2
    seconds = near * links.local.seconds(size) + far * links.network.seconds(on_host * size)
    return Cost(seconds + surplus * links.network.seconds(size), "doubling")


def rabenseifner(links: Links, workers: int, size: float) -> Cost | None:
    """Rabenseifner: reduce-scatter by halving, then all-gather by doubling: 2 log₂ p · α + 2(p − 1)/p · nβ.

    The nearest partner comes first, as in MPICH and Open MPI, so that what goes between hosts is n(1 − 1/hosts) a host
    each way. Surplus workers, and None, as in `recursive_doubling`.
    """
    on_host, hosts = links.split(workers)
    if not _is_power_of_2(on_host) or (on_host > 1 and not _is_power_of_2(hosts)):
        return None
    near, far = on_host.bit_length() - 1, hosts.bit_length() - 1
    surplus = 0 if _is_power_of_2(hosts) else 2
    seconds = 2 * near * links.local.latency + 2 * (1 - 1 / on_host) * size * links.local.seconds_per_byte
    seconds += 2 * far * links.network.latency + 2 * (1 - 1 / (1 << far)) * size * links.network.seconds_per_byte
    return Cost(seconds + surplus * links.network.seconds(size), "Rabenseifner")


def tree(links: Links, workers: int, size: float) -> Cost | None:
    """The quicker of recursive doubling, which is best for few bytes, and Rabenseifner's algorithm, for many."""
    found = [cost for way in (recursive_doubling, rabenseifner) if (cost := way(links, workers, size))]
    return min(found, key=lambda cost: cost.seconds, default=None)


def hierarchical(links: Links, workers: int, size: float) -> Cost | None:
    """Reduce-scatter within each host, all-reduce of each part between hosts at the same time, all-gather within.

    2(w − 1)(α + n/w · β) of the local links, and between H hosts the quicker of ring and tree for n bytes a host.
    None: there is one worker a host, or one host.
    """
    on_host, hosts = links.split(workers)
    if on_host == 1 or hosts == 1:
        return None
    within = 2 * (on_host - 1) * links.local.seconds(size / on_host)
    between = Links(links.network, links.network)
    found = [cost for way in (ring, tree) if (cost := way(between, hosts, size))]
    best = min(found, key=lambda cost: cost.seconds)
    return Cost(within + best.seconds, f"within, {best.algorithm} between")


ALL_REDUCES = {"ring": ring, "tree": tree, "hierarchical": hierarchical}


def all_gather(links: Links, workers: int, size: float) -> float:
    """Seconds until each worker has the `size` bytes of every other, around a ring: (p − 1)(α + nβ)."""
    on_host, hosts = links.split(workers)
    used = [links.local] * (on_host > 1) + [links.network] * (hosts > 1)
    return (workers - 1) * max((link.seconds(size) for link in used), default=0.0)


def all_to_all(links: Links, workers: int, size: float) -> float:
    """Seconds until each worker has sent every other its share of `size` bytes, n/p, one after the other.

    The shares that go to other hosts leave by the one link of the host: w(p − w) · n/p bytes.
    """
    on_host, _ = links.split(workers)
    share, away = size / workers, workers - on_host
    near = (on_host - 1) * links.local.seconds(share)
    return near + away * links.network.seconds(on_host * share)

"""Collective operations message by message: a second way of computing what `toolkit.plan.cost` has formulas for.

Every worker runs a program of rounds, in each of which it sends a slice of its vector to one worker and receives one
from another. A message begins when both are there, takes its link's latency, and then its bytes flow: those of all
messages that leave a host at the time share its link evenly. Values move with them, so that a wrong schedule shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from toolkit.plan.cost import Links


@dataclass(frozen=True)
class Round:
    """What a worker does at a time: sends `give` to a worker, and takes into `take` from a worker; None: no such."""

    to: int | None = None
    give: slice = field(default_factory=lambda: slice(0))
    source: int | None = None
    take: slice = field(default_factory=lambda: slice(0))
    add: bool = True


@dataclass
class _Flow:
    source: int
    to: int
    values: np.ndarray
    begins: float
    left: float


Programs = list[list[Round]]
_NOTHING = 1e-3  # bytes, what rounding leaves


def run(links: Links, programs: Programs, vectors: Sequence[np.ndarray], value_bytes: float = 1.0) -> float:
    """Run the programs on the vectors, in place; seconds until the last worker is done."""
    workers, now = len(programs), 0.0
    at, sent, got = [0] * workers, [False] * workers, [False] * workers
    posted: set[tuple[int, int, int]] = set()
    flows: list[_Flow] = []
    while True:
        for r in range(workers):  # go on to the next round; an idle side of a round is done at once
            while at[r] < len(programs[r]):
                step = programs[r][at[r]]
                if not ((sent[r] or step.to is None) and (got[r] or step.source is None)):
                    break
                at[r], sent[r], got[r] = at[r] + 1, False, False
        if all(at[r] == len(programs[r]) for r in range(workers)):
            return now
        for r in range(workers):
            if at[r] == len(programs[r]) or (to := programs[r][at[r]].to) is None or (r, to, at[r]) in posted:
                continue
            there = programs[to][at[to]] if at[to] < len(programs[to]) else Round()
            if there.source == r and not got[to]:
                posted.add((r, to, at[r]))
                values = vectors[r][programs[r][at[r]].give].copy()
                link = links.local if _host(links, r) == _host(links, to) else links.network
                flows.append(_Flow(r, to, values, now + link.latency, len(values) * value_bytes))
        now = _advance(links, flows, now)
        for flow in [f for f in flows if f.left < _NOTHING and f.begins <= now]:
            flows.remove(flow)
            step = programs[flow.to][at[flow.to]]
            old = vectors[flow.to][step.take]
            vectors[flow.to][step.take] = old + flow.values if step.add else flow.values
            sent[flow.source] = got[flow.to] = True


def _host(links: Links, worker: int) -> int:
    return worker // links.workers_per_host


def _advance(links: Links, flows: list[_Flow], now: float) -> float:
    """Let the bytes flow until something happens: a message's latency is over, or one has arrived."""
    busy = Counter(_host(links, f.source) for f in flows if _between(links, f) and f.begins <= now)
    rates = {}
    for f in flows:
        link, share = (links.network, busy[_host(links, f.source)]) if _between(links, f) else (links.local, 1)
        if f.begins <= now:
            rates[id(f)] = 1 / (link.seconds_per_byte * share)
    events = [f.begins for f in flows if f.begins > now]
    events += [now + f.left / rates[id(f)] for f in flows if id(f) in rates]
    then = min(events)  # an error of the programs', where there is none: they wait for each other
    for f in flows:
        f.left -= rates.get(id(f), 0.0) * (then - now)
    return then


def _between(links: Links, flow: _Flow) -> bool:
    return _host(links, flow.source) != _host(links, flow.to)


def parts(where: slice, number: int) -> list[slice]:
    """Equal slices of one whose length they divide."""
    length = (where.stop - where.start) // number
    return [slice(where.start + i * length, where.start + (i + 1) * length) for i in range(number)]


def ring(group: Sequence[int], where: slice, scatter: bool = True, gather: bool = True) -> dict[int, list[Round]]:
    """A ring's reduce-scatter, after which member i has the sum of part i + 1, its all-gather, or both."""
    cut, size = parts(where, len(group)), len(group)
    found: dict[int, list[Round]] = {}
    for i, worker in enumerate(group):
        before, after = group[i - 1], group[(i + 1) % size]
        rounds = [Round(after, cut[(i - s) % size], before, cut[(i - 1 - s) % size]) for s in range(size - 1)]
        more = [Round(after, cut[(i + 1 - s) % size], before, cut[(i - s) % size], add=False) for s in range(size - 1)]
        found[worker] = (rounds if scatter else []) + (more if gather else [])
    return found


def _surplus(size: int, whole: slice, core: Callable[[list[int]], dict[int, list[Round]]]) -> Programs:
    """Among workers between powers of two: the even ones of the first 2r hand in theirs, and are told the sum after."""
    r = size - (1 << (size.bit_length() - 1))
    members = [*range(1, 2 * r, 2), *range(2 * r, size)]
    programs: Programs = [[] for _ in range(size)]
    for worker, rounds in core(members).items():
        programs[worker] = rounds
    for even in range(0, 2 * r, 2):
        programs[even] = [Round(even + 1, whole), Round(source=even + 1, take=whole, add=False)]
        programs[even + 1] = [Round(source=even, take=whole), *programs[even + 1], Round(even, whole)]
    return programs


def recursive_doubling(size: int, whole: slice) -> Programs:
    """Partners twice as far each round exchange all that they have."""

    def core(members: list[int]) -> dict[int, list[Round]]:
        rounds = (len(members)).bit_length() - 1
        return {
            worker: [Round(members[i ^ (1 << s)], whole, members[i ^ (1 << s)], whole) for s in range(rounds)]
            for i, worker in enumerate(members)
        }

    return _surplus(size, whole, core)


def rabenseifner(size: int, whole: slice) -> Programs:
    """Halving with partners twice as far each round, then the same way back."""

    def core(members: list[int]) -> dict[int, list[Round]]:
        found = {}
        for i, worker in enumerate(members):
            kept, down, up = whole, [], []
            for s in range(len(members).bit_length() - 1):
                partner, (low, high) = members[i ^ (1 << s)], parts(kept, 2)
                mine, other = (high, low) if i >> s & 1 else (low, high)
                down.append(Round(partner, other, partner, mine))
                up.insert(0, Round(partner, mine, partner, other, add=False))
                kept = mine
            found[worker] = down + up
        return found

    return _surplus(size, whole, core)


def hierarchical(size: int, on_host: int, whole: slice) -> Programs:
    """Reduce-scatter within hosts, rings between the same places of all hosts, all-gather within."""
    programs: Programs = [[] for _ in range(size)]
    hosts = [list(range(h, h + on_host)) for h in range(0, size, on_host)]
    for scatter in (True, False):
        for host in hosts:
            for worker, rounds in ring(host, whole, scatter, not scatter).items():
                programs[worker] += rounds
        if scatter:
            for place in range(on_host):
                owned = parts(whole, on_host)[(place + 1) % on_host]
                for worker, rounds in ring([host[place] for host in hosts], owned).items():
                    programs[worker] += rounds
    return programs


def all_to_all(size: int, sources: slice) -> Programs:
    """Each worker's part r goes to worker r, with a partner at every distance; into the second half of its vector."""
    cut, into = parts(sources, size), sources.stop
    length = into // size
    return [
        [
            Round(r ^ s, cut[r ^ s], r ^ s, slice(into + (r ^ s) * length, into + ((r ^ s) + 1) * length), add=False)
            for s in range(1, size)
        ]
        for r in range(size)
    ]


def last_bucket(backward: float, buckets: int, seconds: float) -> float:
    """When the last of equal buckets has been exchanged, one after another, each once the backward pass has made it."""
    free = 0.0
    for number in range(1, buckets + 1):
        free = max(free, backward * number / buckets) + seconds
    return free

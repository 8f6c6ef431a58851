"""A plan as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from toolkit.plan.cost import ALL_REDUCES, Link
from toolkit.plan.schemes import Compression
from toolkit.plan.step import Step, Training

_LITTLE = 0.01  # of a step, which is not worth a word
PLAIN = {"ring": "by a ring", "tree": "by a tree", "hierarchical": "within hosts, then between them"}


def link(given: Link) -> str:
    """A link in the units of its flags."""
    text = f"{given.latency * 1e6:.3g} µs a message, {8e-9 / given.seconds_per_byte:.3g} Gbit/s"
    return text + (f", {given.agreement * 1e6:.3g} µs to agree on an operation" if given.agreement else "")


def all_reduces(training: Training, counts: Sequence[int]) -> list[str]:
    """Milliseconds of a step by each way; the best of them with and without overlap."""
    rows = [
        [
            "workers",
            "compute",
            *ALL_REDUCES,
            "efficiency",
            "|",
            "overlap",
            "by",
            "buckets",
            "efficiency",
            _speed(training),
        ]
    ]
    for n in counts:
        plain, hidden = training.best(n), training.best(n, overlap=True)
        if plain is None or hidden is None:  # the ring is there for any number
            continue
        ways = [training.step(n, name, Compression()) for name in ALL_REDUCES]
        rows.append(
            [
                str(n),
                _ms(plain.compute),
                *(_ms(way.seconds) if way else "-" for way in ways),
                f"{plain.efficiency:.0%}",
                "|",
                _ms(hidden.seconds),
                hidden.all_reduce,
                str(hidden.buckets),
                f"{hidden.efficiency:.0%}",
                f"{hidden.samples_per_second:.4g}",
            ]
        )
    return _aligned(rows)


def compressions(training: Training, counts: Sequence[int]) -> list[str]:
    """Milliseconds of a step without overlap under each compression, by the best way for it."""
    known = [c for c in training.compressions if c.size(training.gradients) is not None]
    rows = [["workers", *(f"{c.name}{'' if c.seconds is not None or c.name == 'none' else '*'}" for c in known)]]
    rows.append(["MB", *(f"{(c.size(training.gradients) or 0) / 1e6:.3g}" for c in known)])
    for n in counts:
        steps = [training.best(n, compression=c) for c in known]
        rows.append([str(n), *(_ms(step.seconds) if step else "-" for step in steps)])
    return _aligned(rows)


def verdict(training: Training, counts: Sequence[int], least: float) -> list[str]:
    """In plain lines: which number of workers pays by which way, and which compression may cost how much.

    Args:
        counts: of workers, ascending, from 1.
        least: the efficiency that pays.
    """
    lines, chosen = [], counts[0]
    for overlap in (False, True):
        steps = [step for n in counts if (step := training.best(n, overlap=overlap))]
        best = max((s for s in steps if s.efficiency >= least), key=lambda s: s.samples_per_second, default=steps[0])
        chosen = max(chosen, best.workers)
        lines.append(f"{'With' if overlap else 'Without'} overlap {_pays(steps, best, least)}")
    several = [n for n in counts if n > training.links.workers_per_host]
    lines.append(_compressed(training, chosen if chosen > 1 else counts[min(1, len(counts) - 1)]))
    return [*lines, *_break_even(training, max(chosen, several[0]) if several else 0)]


def _pays(steps: Sequence[Step], best: Step, least: float) -> str:
    fastest = max(steps, key=lambda step: (step.samples_per_second, -step.workers))
    more = "" if fastest == best else f"; the fastest are {fastest.workers}, {_gain(fastest, steps[0])}"
    if best.workers == 1:
        return f"more than 1 worker does not pay, at {least:.0%} efficiency or more{more}."
    exact = "" if best.algorithm == best.all_reduce else f" ({best.algorithm})"
    buckets = f", in {best.buckets} buckets" if best.buckets > 1 else ""
    return f"{best.workers} workers pay, {PLAIN[best.all_reduce]}{exact}{buckets}: {_gain(best, steps[0])}{more}."


def _gain(step: Step, one: Step) -> str:
    return f"{step.samples_per_second / one.samples_per_second:.3g} times one worker's speed ({step.efficiency:.0%})"


def _compressed(training: Training, workers: int) -> str:
    """What compressions may cost on so many workers, or save where their cost is known."""
    said = []
    for c in training.compressions:
        most = None if c.name == "none" else training.affordable(workers, c)
        plain = training.best(workers)
        if most is None or plain is None:
            continue
        if most < _LITTLE * plain.seconds:
            said.append(f"{c.name} not at all")
        elif c.seconds is None:
            said.append(f"{c.name} if it costs less than {_ms(most)} ms")
        else:
            said.append(f"{c.name} {'saves' if most > c.seconds else 'loses'} {_ms(abs(most - c.seconds))} ms")
    return f"On {workers} workers without overlap, does compression pay? A step: {', '.join(said)}."


def _break_even(training: Training, workers: int) -> list[str]:
    """Below which rate of a host's link compressions pay, of those whose cost is known; nothing without such links."""
    known = [c for c in training.compressions if c.name != "none" and c.seconds is not None]
    known = [c for c in known if c.size(training.gradients) is not None]
    if not known or not workers:
        return []
    said = []
    for c in known:
        limit = training.pays_below(workers, c)
        rate = "on any link" if math.isinf(limit) else f"below {limit / 1e9:.2g} Gbit/s" if limit else "on no slow one"
        said.append(f"{c.name} {rate}")
    return [f"Between hosts it pays on {workers} workers where a host's link reaches: {', '.join(said)}."]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _speed(training: Training) -> str:
    return "samples/s" if training.compute.samples > 1 or training.compute.global_batch else "steps·workers/s"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

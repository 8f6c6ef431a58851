"""The benchmark's results as tables: targets first, then everything that was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.benchmarks import groups
from tests.benchmarks.models import BATCH, MODELS

ALIKE = 0.01  # largest difference of what weights have changed by that is rounding: without averaging it is near 1
MEMORY_LIMIT, START_LIMIT = 1.1, 0.5  # of a rank's memory; seconds over a bare script
GRADIENT_BYTES = 4  # float32
Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """Everything, as results.md has it."""
    machine = results["machine"]
    text = [
        "# The benchmark against peers",
        f"Written by `make bench`: {machine['cores']} cores, {machine['processor']}; torch {machine['torch']}, "
        f"TensorFlow {machine['tensorflow']}, Keras {machine['keras']}, Horovod {machine['horovod']}; "
        f"load of the machine by others before it began: {machine['load']:.2f}.",
        "Contestants of one table train the same model from the same weights on the same batches, "
        f"{BATCH} samples a rank, with SGD and as many compute threads (cores // ranks, at least 1). They take turns "
        f"of about {machine['turn_seconds']} s, {machine['rounds']} rounds in changing order, while all threads of the "
        "others are stopped; with other than 2 ranks at most 5 rounds of half of that time. A step's time is the "
        "slowest rank's. Ratios are of medians; the worst is that of the one round that is worst for us.",
        *_measured_again(results),
        "## Targets",
        _table(["step time, 2 ranks", "at most", "measured", "worst round", ""], _target_rows(results)),
        *_sections(results),
    ]
    return "\n\n".join(text) + "\n"


def _measured_again(results: Results) -> Iterator[str]:
    """Which groups are of a later run than the others, by `--update`."""
    later: dict[str, list[str]] = {}
    for group in results["groups"]:
        if machine := group.get("again"):
            of = f"{machine['cores']} cores, {machine['processor']}; load {machine['load']:.2f}"
            later.setdefault(of, []).append(group["name"])
    for of, names in later.items():
        yield f"Measured again in a later run ({of}), each group whole: {', '.join(names)}."


def group_of(results: Results, framework: str, model: str, ranks: int) -> Mapping[str, Any]:
    """The contestants of a group by name; empty where it was not run."""
    name = groups.Group(framework, model, ranks).name
    return next((group["contestants"] for group in results["groups"] if group["name"] == name), {})


def median(contestant: Mapping[str, Any]) -> float:
    """Milliseconds a step."""
    return statistics.median(contestant["milliseconds_per_step"])


def is_sound(contestant: Mapping[str, Any]) -> bool:
    """Whether it came to the end and, if its ranks talk, computed what it should."""
    if contestant["failed"] or not contestant["milliseconds_per_step"]:
        return False
    return not contestant["talks"] or (contestant["ranks_equal"] and contestant["difference"] <= ALIKE)


def measured(results: Results, target: groups.Target) -> tuple[str, float, float] | None:
    """The peer that was compared with, the ratio of medians, and the worst of the rounds' ratios.

    None where it was not run, or one of them failed or computed something else.
    """
    found = group_of(results, target.framework, target.model, target.ranks)
    ours = found.get(target.ours)
    peers = [name for name in target.peers if name in found and is_sound(found[name])]
    if ours is None or not is_sound(ours) or not peers:
        return None
    peer = min(peers, key=lambda name: median(found[name]))
    rounds = zip(ours["milliseconds_per_step"], found[peer]["milliseconds_per_step"], strict=True)
    return peer, median(ours) / median(found[peer]), max(one / other for one, other in rounds)


def verdict(value: float, limit: float) -> str:
    """Met, or by how much it was missed."""
    return "met" if value <= limit else f"missed by {100 * (value / limit - 1):.0f} %"


def _target_rows(results: Results) -> Iterator[list[str]]:
    for target in groups.TARGETS:
        if not group_of(results, target.framework, target.model, target.ranks):
            continue
        found = measured(results, target)
        if found is None:
            yield [target.text, f"{target.limit:.2f}", "–", "–", "not measured"]
            continue
        peer, ratio, worst = found
        text = target.text.replace(target.peers[0], peer) if len(target.peers) > 1 else target.text
        yield [text, f"{target.limit:.2f}", f"{ratio:.2f}", f"{worst:.2f}", verdict(ratio, target.limit)]
    for name, more in _starts(results):
        yield [f"{name}: seconds over a bare script", f"≤ {START_LIMIT}", f"{more:.2f}", "", verdict(more, START_LIMIT)]
    for name, ratio in _memory(results):
        text = f"{name}: memory of a rank against one bare process and a gradient buffer"
        yield [text, f"{MEMORY_LIMIT:.2f}", f"{ratio:.2f}", "", verdict(ratio, MEMORY_LIMIT)]


def _starts(results: Results) -> Iterator[tuple[str, float]]:
    for name, found in results["first_step"].items():
        if not isinstance(found, str):
            more = statistics.median(found["ours"]) - statistics.median(found["a bare script"])
            yield f"launch to first step, {name}", more


def _memory(results: Results) -> Iterator[tuple[str, float]]:
    """A rank's peak of memory as a share of what the bare process has and one more gradient takes."""
    for framework in ("torch", "tensorflow"):
        for model in MODELS:
            bare = group_of(results, framework, model, 1).get(groups.FLOOR)
            ours = group_of(results, framework, model, 2).get(groups.OURS)
            if bare and ours and bare["peak_megabytes"] and ours["peak_megabytes"]:
                buffer = MODELS[model].parameters * GRADIENT_BYTES / 2**20
                allowed = max(bare["peak_megabytes"]) + buffer
                yield f"{framework}, {MODELS[model].title}", max(ours["peak_megabytes"]) / allowed


def _sections(results: Results) -> Iterator[str]:
    cores = results["machine"]["cores"]
    for framework in groups.FRAMEWORKS:
        for ranks in groups.RANKS:
            rows = [row for model in MODELS for row in _group_rows(results, framework, model, ranks)]
            if rows:
                crowded = f": more than the {cores} cores" if ranks > cores else ""
                yield f"## {framework}, {ranks} rank(s){crowded}"
                yield _table(_COLUMNS, rows)
    yield (
        "The last column: whether all ranks held the same weights after the first and after the last steps; and by how "
        "much rank 0's after the first steps are others than the reference's (in torch and TensorFlow Horovod by hand, "
        "in Keras ours on TensorFlow), as a share of what those steps had changed. Without averaging it is near 1; a "
        f"contestant above {ALIKE} counts for no target."
    )
    yield from _whole_runs(results)


_COLUMNS = [
    "model",
    "contestant",
    "ms a step: median (min … max)",
    "samples a second",
    "times the floor",
    "ours takes, of its time",
    "memory of a rank, MiB",
    "weights of the ranks; difference to the reference",
]


def _group_rows(results: Results, framework: str, model: str, ranks: int) -> Iterator[list[str]]:
    found = group_of(results, framework, model, ranks)
    title = f"{MODELS[model].title}, {MODELS[model].parameters * GRADIENT_BYTES:,} bytes of gradients a step"
    for name, contestant in found.items():
        if contestant["failed"]:
            yield [title, name, f"failed: {contestant['failed']}", "", "", "", "", ""]
        elif contestant["milliseconds_per_step"]:
            times = contestant["milliseconds_per_step"]
            middle = median(contestant)
            yield [
                title,
                name,
                f"{middle:.3g} ({min(times):.3g} … {max(times):.3g})",
                f"{ranks * BATCH / middle * 1000:,.0f}",
                _ratio(contestant, found.get(floor_of(name))),
                _ratio(found.get(_ours_of(name)), contestant),
                f"{max(contestant['peak_megabytes'], default=0):.0f}",
                _soundness(contestant),
            ]
        title = ""


def floor_of(name: str) -> str:
    """Whose processes do the same without communication."""
    return next((groups.FIT[b] for b in groups.KERAS if name in (groups.KERAS[b], groups.FIT[b])), groups.FLOOR)


def _ours_of(name: str) -> str:
    return next((groups.KERAS[b] for b in groups.KERAS if name in (groups.KERAS[b], groups.FIT[b])), groups.OURS)


def _ratio(above: Mapping[str, Any] | None, below: Mapping[str, Any] | None) -> str:
    if not above or not below or not above["milliseconds_per_step"] or not below["milliseconds_per_step"]:
        return "–"
    return f"{median(above) / median(below):.2f}"


def _soundness(contestant: Mapping[str, Any]) -> str:
    if not contestant["talks"]:
        return "each its own"
    equal = "equal" if contestant["ranks_equal"] else "**differ**"
    difference = contestant["difference"]
    return f"{equal}; {difference:.1e}" + ("" if difference <= ALIKE else ": **computes something else**")


def _whole_runs(results: Results) -> Iterator[str]:
    if results["first_step"]:
        yield "## From launch to the first step"
        yield "Seconds until the slower of 2 ranks has taken a step of the CNN; starts in turns."
        yield _table(["", "", "median (min … max)"], _seconds_rows(results["first_step"]))
    if results["epochs"]:
        yield "## An epoch with its input"
        yield (
            "Seconds an epoch of the digits' CNN, 1437 samples in global batches of 128, with the evaluation at its "
            "end. The bare scripts load by torch's DataLoader over a TensorDataset and by tf.data."
        )
        yield _table(["", "", "median (min … max)"], _seconds_rows(results["epochs"]))


def _seconds_rows(tables: Mapping[str, Any]) -> Iterator[list[str]]:
    for title, found in tables.items():
        if isinstance(found, str):
            yield [title, f"failed: {found}", ""]
            continue
        for name, seconds in found.items():
            yield [title, name, f"{statistics.median(seconds):.3g} ({min(seconds):.3g} … {max(seconds):.3g})"]
            title = ""


def _table(columns: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

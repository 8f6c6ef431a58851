"""What a drill found, and the table of all of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Drill:
    """One kind of fault, tried some times on one launcher with one framework.

    Attributes:
        fault: what was done, such as `kill -9 of a random rank`.
        launcher: mpirun, horovodrun, horovodrun-gloo or none.
        framework: torch, tensorflow, or keras with its backend.
        times: how often it was tried.
        seconds: of each try, from the fault until every process of the job was gone or the fault was told.
        lost_steps: of each try, steps that had to be done again.
        failures: what went otherwise than promised, a line each.
    """

    fault: str
    launcher: str
    framework: str
    times: int = 0
    seconds: list[float] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


_HEAD = ("fault", "launcher", "framework", "times", "detected in: median", "worst", "lost steps: median", "worst", "ok")


def table(drills: Iterable[Drill]) -> str:
    """A Markdown table of a row a drill, and below it the failures."""
    drills = list(drills)
    rows = [_HEAD, tuple("-" * len(name) for name in _HEAD), *(_row(drill) for drill in drills)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([*lines, *(f"{drill.fault}: {failure}" for drill in drills for failure in drill.failures)])


def _row(drill: Drill) -> tuple[str, ...]:
    seconds = [f"{value:.1f} s" for value in _median_and_worst(drill.seconds)] or ["–", "–"]
    steps = [f"{value:g}" for value in _median_and_worst(drill.lost_steps)] or ["–", "–"]
    right = f"{max(0, drill.times - len(drill.failures))}/{drill.times}"
    return (drill.fault, drill.launcher, drill.framework, str(drill.times), *seconds, *steps, right)


def _median_and_worst(values: list[float] | list[int]) -> list[float]:
    return [statistics.median(values), max(values)] if values else []

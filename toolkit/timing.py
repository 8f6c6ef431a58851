"""When a run's steps ended, for tools that time a recipe: in the file that HVDKIT_STEP_TIMES names.

Rank r writes FILE.rank<r>, once, at its run's end: a JSON list of `[kind, epoch, seconds]`, where kind is "begin", when
an epoch's first batch is asked for, or "end", when a step has ended, and seconds are of the machine's monotonic clock.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

VARIABLE = "HVDKIT_STEP_TIMES"


class StepTimes:
    """Notes a run's moments where the variable is set, and else nothing."""

    def __init__(self, rank: int) -> None:
        file = os.environ.get(VARIABLE)
        self._path = Path(f"{file}.rank{rank}") if file else None
        self._moments: list[tuple[str, int, float]] = []

    def note(self, kind: str, epoch: int) -> None:
        """Note this moment."""
        if self._path is not None:
            self._moments.append((kind, epoch, time.monotonic()))

    def write(self) -> None:
        """Write the file."""
        if self._path is not None:
            self._path.write_text(json.dumps(self._moments))


def seconds_of_steps(path: Path, warm_up: int) -> list[float]:
    """Seconds of each step after the first `warm_up` of a run; empty where it took no more steps.

    What happens between epochs, such as an evaluation, is left out, but where every epoch is one step of a loop that
    is not the recipe's own, as in Keras' `fit`.

    Args:
        path: of one rank.
        warm_up: steps, ≥ 0.
    """
    within: list[float] = []
    across: list[float] = []
    steps = 0
    before: tuple[str, int, float] | None = None
    for kind, epoch, moment in json.loads(path.read_text()):
        if kind == "end":
            steps += 1
            if before is not None and steps > warm_up:
                (within if before[1] == epoch else across).append(moment - before[2])
        before = kind, epoch, moment
    return within or across

"""Drills of one rank that fails, vanishes, stalls or leaves early: how soon every process of the job is gone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.drills.report import Drill
from tests.faults import harm

LAUNCHERS = ("mpirun", "horovodrun", "horovodrun-gloo")
STALL_TIMEOUT = 8.0
# What is done, where, and the words that our last line must have. Before Horovod starts the launcher has the word.
FAULTS = {
    "exception in a step": ("raise", "step", "OSError: the disk of this rank is gone"),
    "exception in the input": ("raise", "data", "OSError: the disk of this rank is gone"),
    "kill -9 at the start": ("kill", "start", ""),
    "kill -9 at the first collective": ("kill", "first", "ended without a word"),
    "kill -9 in a step": ("kill", "step", "ended without a word"),
    "kill -9 in evaluation": ("kill", "evaluation", "ended without a word"),
    "kill -9 while a checkpoint is written": ("kill", "checkpoint", "ended without a word"),
    "SIGSTOP": ("stop", "step", "it is stopped (SIGSTOP)"),
    "stuck in the input": ("sleep", "data", "did not come: it is"),
    "early exit": ("exit", "step", "left early: it ended its script without stop()"),
    "early stop()": ("leave", "step", "left early: it called stop()"),
}


def drills(
    times: int,
    launchers: Sequence[str] = LAUNCHERS,
    frameworks: Sequence[str] = ("torch", "tensorflow", "keras-tensorflow"),
    faults: Sequence[str] = tuple(FAULTS),
) -> Iterator[Drill]:
    """Every fault on every launcher and framework, `times` each, on ranks in turn; two workers.

    The seconds of a stall count from the fault, with a --stall-timeout of 8 s; of the others all must be gone in 10 s.
    """
    for fault in faults:
        for launcher in launchers:
            for framework in frameworks:
                yield drill(fault, launcher, framework, times)


def drill(fault: str, launcher: str, framework: str, times: int) -> Drill:
    """One kind of fault, `times` on ranks in turn."""
    what, moment, words = FAULTS[fault]
    result = Drill(fault, launcher, framework)
    for number in range(times):
        result.times += 1
        stalls = what in ("stop", "sleep")
        with tempfile.TemporaryDirectory() as directory:
            try:
                ended = harm(
                    Path(directory, "run"),
                    what,
                    number % 2,
                    moment,
                    framework=framework,
                    launcher=launcher,
                    stall_timeout=STALL_TIMEOUT if stalls else 300,
                )
            except Exception as error:  # noqa: BLE001 - the other tries go on
                result.failures.append(f"{launcher}, {framework}, rank {number % 2}: {error}")
                continue
        result.seconds.append(ended.seconds)
        problems = ended.problems(words, limit=10 + (2 * STALL_TIMEOUT if stalls else 0))
        if problems:
            result.failures.append(f"{launcher}, {framework}, rank {number % 2}: {'; '.join(problems)}")
    return result

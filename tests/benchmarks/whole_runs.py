"""What turns of steps don't show: the time from launch to the first step, and epochs with their input."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import turns
from tests.benchmarks.arena import Contestant, Failed, Job
from tests.launching import ROOT, launch
from toolkit.tuning import usable_cores

Measured = dict[str, list[float]]  # by who was measured
RANKS = 2
GLOBAL_BATCH = 128


def seconds_to_first_step(framework: str, launcher: str, repetitions: int, directory: Path) -> Measured:
    """From launch until the slowest rank has taken a step of the CNN: ours, a bare script's, Horovod's by hand.

    Returns:
        Seconds of each start.

    Raises:
        Failed: one of them does not come to its first step.
    """
    contestants = [
        Contestant("ours", (f"{framework}_ours.py",), launcher),
        Contestant("a bare script", (f"{framework}_floor.py",), launcher, talks=False),
        Contestant("horovod as documented", (f"{framework}_horovod.py",), launcher),
    ]
    measured: Measured = {contestant.name: [] for contestant in contestants}
    for i in range(repetitions):
        for contestant in contestants[i % 3 :] + contestants[: i % 3]:
            with Job(contestant, "cnn", RANKS, directory / f"start{i}") as job:
                job.meet()
                ended = max(answer["at"] for answer in job.steps(1))
                measured[contestant.name].append(ended - job.launched)
    return measured


def seconds_per_epoch(framework: str, repetitions: int, epochs: int, directory: Path) -> Measured:
    """Epochs of the digits' CNN with input and evaluation: the recipe's, and a bare script's by its own loader."""
    measured: Measured = {}
    for _ in range(repetitions):
        for size in (1, RANKS):
            bare = f"bare script, {size} process(es)" + (", each on its part, no communication" if size > 1 else "")
            measured.setdefault(bare, []).extend(_bare_epochs(framework, size, epochs, directory))
            measured.setdefault(f"recipe, {size} worker(s)", []).extend(
                _recipe_epochs(framework, size, epochs, directory)
            )
    return measured


def _bare_epochs(framework: str, size: int, epochs: int, directory: Path) -> list[float]:
    """Seconds of each epoch but the first, of the slowest process."""
    script = Path(__file__).parent / "contestants" / f"epoch_{framework}.py"
    printed = _run(size, [script, str(epochs), str(GLOBAL_BATCH)], directory)
    found = [float(number) for number in re.findall(r"seconds (\S+) loss", printed)]
    if len(found) != size * epochs:
        raise Failed(f"{script.name} printed {len(found)} epochs of {size * epochs}")
    # The processes' lines are mixed; epochs take them alike but for noise, so that all of them count.
    return found[size:]


def _recipe_epochs(framework: str, size: int, epochs: int, directory: Path) -> list[float]:
    """Seconds of each epoch but the first."""
    output = directory / f"recipe{len(list(directory.iterdir()))}"
    options = ["--epochs", str(epochs), "--global-batch-size", str(GLOBAL_BATCH), "--checkpoint-every", str(epochs)]
    _run(size, [ROOT / "recipes" / f"cnn_{framework}.py", *options, "--output", str(output)], directory)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["seconds"] for row in rows if row["kind"] == "epoch"][1:]


def _run(size: int, command: Sequence[str | Path], directory: Path) -> str:
    environment = {
        "TMPDIR": str(directory),
        turns.MODEL: "cnn",
        turns.THREADS: str(max(1, usable_cores() // size)),
    }
    try:
        done = launch(size, command, environment=environment, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{Path(command[0]).name} took more than 600 s") from error
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["it failed without a word"])[-1][:300])
    return done.stdout

"""One run, told to stop again and again, resumed each time: at the end it is the undisturbed one, to the bit.

python -m tests.drills.stops --times 10 --recipes linear_regression_torch
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.drills.kills import ENDLESS, begun_at, differences_at_the_end, is_rank, newest_step, wait_until_begun
from tests.drills.report import Drill, table
from tests.launching import begin, kill_marked, marked, seconds_until_gone
from toolkit import checkpoint

# Of each recipe: steps in an epoch, and its options.
_RUNS = {
    "linear_regression": (
        28,
        ["--global-batch-size", "16", "--learning-rate", "0.001", "--checkpoint-every", "1000", "--noise", "0.1"],
    ),
    "cnn": (45, ["--dropout", "0.2", "--shift", "1", "--checkpoint-every", "1000"]),
}
_LONGEST = 120  # seconds


def drills(
    times: int,
    *,
    recipes: Sequence[str] = ("linear_regression_torch", "cnn_torch"),
    launcher: str = "mpirun",
    signals: Sequence[int] = (signal.SIGTERM,),
    seed: int = 0,
) -> Iterator[Drill]:
    """For each recipe a chain of its share of the stops: a signal to a rank or to the launcher, then a resume.

    Args:
        times: number of signals.
        recipes: names of the recipes; each trains with two workers.
        launcher: as `tests.launching.launch` names them.
        signals: one of them is sent each time.
        seed: of when and to whom.
    """
    for i, recipe in enumerate(recipes):
        share = times // len(recipes) + (i < times % len(recipes))
        yield _chain(recipe, launcher, signals, random.Random(seed + i), share)


def _chain(recipe: str, launcher: str, signals: Sequence[int], generator: random.Random, times: int) -> Drill:
    kind, _, framework = recipe.rpartition("_")
    per_epoch, options = _RUNS[kind]
    names = " or ".join(signal.Signals(number).name for number in signals)
    drill = Drill(f"{names} to a rank or the launcher, {kind.replace('_', ' ')}", launcher, framework)
    with tempfile.TemporaryDirectory(prefix="hvdkit-stops-") as place:
        straight, work = Path(place, "straight"), Path(place, "work")
        command = [f"recipes/{recipe}.py", *options, "--print-every", "1000000", "--keep", "1"]
        for _ in range(times):
            where = ["--output", str(work), *(["--resume"] if work.is_dir() else [])]
            _stop(drill, [*command, *ENDLESS, *where], work, launcher, generator.choice(signals), generator)
        drill.failures += differences_at_the_end(command, straight, work, per_epoch, launcher)
    return drill


def _stop(drill: Drill, command: list[str], work: Path, launcher: str, number: int, generator: random.Random) -> None:
    """Start or resume, send the signal at a random moment, and note what came of it."""
    before = newest_step(work)
    with tempfile.TemporaryFile("w+") as printed:
        process, mark = begin(2, command, launcher=launcher, printed=printed)
        try:
            wait_until_begun(printed, process)
            time.sleep(generator.uniform(0, 0.8))
            ranks = sorted(pid for pid in marked(mark) if is_rank(pid))
            rank = generator.choice([None, *ranks])
            os.kill(process.pid if rank is None else rank, number)
            drill.seconds.append(seconds_until_gone(mark, _LONGEST))
            left = kill_marked(mark)
            code = process.wait(60)
        finally:
            kill_marked(mark)
            process.wait(60)
        printed.seek(0)
        text = printed.read()
    drill.times += 1
    drill.lost_steps.append(0 if _is_told(text, work) else -1)
    # A launcher that gets the signal itself answers by a code of its own, or by the signal.
    right = code == 128 + number if rank is not None and "horovodrun" not in launcher else code != 0
    told = text.count("; to go on: ")
    begun, newest = begun_at(text), newest_step(work)
    if left or not right or told != 1 or begun != before or newest <= before or not _is_told(text, work):
        where = "the launcher" if rank is None else "a rank"
        found = f"{where}: exit code {code}; left: {left}; told {told} times; newest {newest} after {before}"
        drill.failures.append(f"{found}; went on from {begun}; {text[-800:]}")


def _is_told(text: str, work: Path) -> bool:
    """Whether the newest checkpoint is of the step that the message names."""
    newest = checkpoint.newest(work)
    return newest is not None and f" after step {newest.manifest['step']}; to go on: " in text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--recipes", nargs="+", default=["linear_regression_torch", "cnn_torch"])
    parser.add_argument("--launcher", default="mpirun")
    parser.add_argument("--sigint", action="store_true", help="send SIGINT as often as SIGTERM")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    both = (signal.SIGTERM, signal.SIGINT) if given.sigint else (signal.SIGTERM,)
    print(table(drills(given.times, recipes=given.recipes, launcher=given.launcher, signals=both, seed=given.seed)))

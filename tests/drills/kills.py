"""One run, killed by `kill -9` again and again, resumed each time: at the end it is the undisturbed one, to the bit.

python -m tests.drills.kills --times 30 --recipes linear_regression_torch cnn_torch
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.drills.report import Drill, table
from tests.launching import begin, kill_marked, launch, marked, seconds_until_gone
from toolkit import checkpoint, output

# Of each recipe: steps in an epoch, steps between checkpoints, steps that the run has for each kill, and its options.
_RUNS = {
    "linear_regression": (
        28,
        10,
        1500,
        ["--global-batch-size", "16", "--learning-rate", "0.001", "--checkpoint-every", "1000", "--noise", "0.1"],
    ),
    "cnn": (45, 3, 300, ["--dropout", "0.2", "--shift", "1"]),
}
_MOMENTS = ("while it trains", "while a checkpoint is written", "while it starts")
_LONGEST = 120  # seconds of a start
_MANY = 30  # kills of a run, among which some must have hit the writing of a checkpoint
_BEGIN = re.compile(r": (?:resumed at epoch \d+, step (\d+)|new run|no checkpoint to resume yet, begun anew) in ")


def drills(
    times: int,
    *,
    recipes: Sequence[str] = ("linear_regression_torch", "cnn_torch"),
    launcher: str = "mpirun",
    seed: int = 0,
) -> Iterator[Drill]:
    """For each recipe a chain of its share of the kills, a drill for each kind of moment.

    A third of the kills falls into the writing of a checkpoint. Lost steps are those in metrics.jsonl after
    the checkpoint that is resumed; rows are written when a checkpoint is, so a few more may be unknown. The seconds
    are those of kills that left the launcher and a rank to notice them.

    Args:
        times: number of kills.
        recipes: names of the recipes; each trains with two workers.
        launcher: as `tests.launching.launch` names them.
        seed: of when and whom.
    """
    for i, recipe in enumerate(recipes):
        share = times // len(recipes) + (i < times % len(recipes))
        yield from _Chain(recipe, launcher, random.Random(seed + i)).run(share)


@dataclass
class _Chain:
    recipe: str
    launcher: str
    generator: random.Random

    def run(self, times: int) -> list[Drill]:
        kind, _, framework = self.recipe.rpartition("_")
        per_epoch, every, per_kill, options = _RUNS[kind]
        epochs = str(-(-times * per_kill // per_epoch) + 1)
        found = {
            moment: Drill(f"kill -9 {moment}, {kind.replace('_', ' ')}", self.launcher, framework)
            for moment in _MOMENTS
        }
        with tempfile.TemporaryDirectory(prefix="hvdkit-kills-") as place:
            straight, self.work = Path(place, "straight"), Path(place, "work")
            self.command = [f"recipes/{self.recipe}.py", "--epochs", epochs, *options, "--checkpoint-steps", str(every)]
            self.command += ["--print-every", "1000000"]
            result = launch(2, [*self.command, "--output", straight], launcher=self.launcher, timeout=3600)
            if result.returncode:
                raise RuntimeError(f"the undisturbed run failed: {result.stderr}")
            unfinished = 0
            for number in range(times):
                moment = _MOMENTS[1] if number % 3 == 1 else _MOMENTS[2] if number % 6 == 3 else _MOMENTS[0]
                unfinished += self._kill(found[moment], moment)
            before = newest_step(self.work)
            result = launch(2, [*self.command, *self._where()], launcher=self.launcher, timeout=3600)
            drills = [drill for drill in found.values() if drill.times]
            found[_MOMENTS[1]].fault += f" ({unfinished} left in part)"
            problems = [f"at the end: {line}" for line in differences(straight, self.work)]
            if result.returncode:
                problems.append(f"the last resume failed: {result.stderr[-2000:]}")
            elif begun_at(result.stdout) != before:
                problems.append(f"the last resume went on from step {begun_at(result.stdout)}, not {before}")
            if times >= _MANY and not unfinished:
                problems.append("no kill has cut the writing of a checkpoint short")
            for drill in drills:
                drill.failures += problems
        return drills

    def _where(self) -> list[str]:
        """A user who sees no directory yet starts anew; one who sees it resumes."""
        return ["--output", str(self.work), *(["--resume"] if self.work.is_dir() else [])]

    def _kill(self, drill: Drill, moment: str) -> bool:
        """Start or resume, kill at such a moment, and note what came of it; True where a checkpoint was cut short."""
        before = newest_step(self.work)
        with tempfile.TemporaryFile("w+") as printed:
            process, mark = begin(2, [*self.command, *self._where()], launcher=self.launcher, printed=printed)
            try:
                ended = self._wait_for(moment, printed, process)
                job = marked(mark)
                ranks = sorted(pid for pid, line in job.items() if is_rank(pid) and self.recipe in line)
                victims = [self.generator.choice(ranks)] if ranks and self.generator.random() < 0.75 else list(job)
                if moment == _MOMENTS[1]:
                    ended = ended or self._wait_for_writing(process)
                for pid in victims:
                    _kill(pid)
                seconds = seconds_until_gone(mark, 60)
                left = kill_marked(mark)
                code = process.wait(60)
            finally:
                kill_marked(mark)
                process.wait(60)
            printed.seek(0)
            text = printed.read()
        drill.times += 1
        if victims != list(job):  # else nobody was left to notice anything
            drill.seconds.append(seconds)
        cut_short = bool(list(self.work.glob(".step-*.tmp")))
        newest, damages = checkpoint.newest_whole(checkpoint.steps(self.work))
        rows = output.read_metrics(self.work, "step") if (self.work / "metrics.jsonl").exists() else []
        resumed_from = newest.manifest["step"] if newest else 0
        drill.lost_steps.append(max((rows[-1]["step"] if rows else 0) - resumed_from, 0))
        begun = begun_at(text)
        astray = begun != before and (begun is not None or moment != _MOMENTS[2])
        if ended or astray or left or damages or code == 0 or seconds > 10:
            found = f"ended before: {ended}; exit code {code}; {seconds:.1f} s; left: {left}; damaged: {damages}"
            drill.failures.append(f"went on from step {begun}, not {before}; {found}; {text[-500:]}")
        return cut_short

    def _wait_for(self, moment: str, printed: IO[str], process: subprocess.Popen) -> bool:
        """Return at such a moment, or before the next writing; True where the run has ended before it."""
        if moment == _MOMENTS[2]:
            return self._pause(process, self.generator.uniform(0, 6))
        return not wait_until_begun(printed, process) or self._pause(process, self.generator.uniform(0, 0.8))

    def _wait_for_writing(self, process: subprocess.Popen) -> bool:
        while not any(name.startswith(".step-") for name in os.listdir(self.work)):
            if process.poll() is not None:
                return True
        time.sleep(self.generator.uniform(0, 0.004))  # somewhere in its files
        return False

    def _pause(self, process: subprocess.Popen, seconds: float) -> bool:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def newest_step(run: Path) -> int:
    """The step of a run's newest whole checkpoint; 0 where there is none."""
    found, _ = checkpoint.newest_whole(checkpoint.steps(run))
    return found.manifest["step"] if found else 0


def begun_at(text: str) -> int | None:
    """The step that a start says it goes on from, 0 where it says that it begins anew; None: it says nothing yet."""
    found = _BEGIN.search(text)
    return found and int(found[1] or 0)


def wait_until_begun(printed: IO[str], process: subprocess.Popen) -> bool:
    """Return once a start has said from where it goes on; False: it ended before, or took too long."""
    end = time.monotonic() + _LONGEST
    while time.monotonic() < end and process.poll() is None:
        if begun_at(os.pread(printed.fileno(), 1 << 20, 0).decode(errors="replace")) is not None:
            return True
        time.sleep(0.02)
    return False


def differences(straight: Path, work: Path) -> list[str]:
    """What of a finished run is not as in the undisturbed one."""
    expected, found = checkpoint.newest(straight), checkpoint.newest(work)
    if expected is None or found is None:
        return ["there is no checkpoint"]
    problems = [] if expected.path.name == found.path.name else [f"it ended at {found.path.name}"]
    problems += list(expected.state.keys() ^ found.state.keys())
    problems += [
        f"{name} differs"
        for name in expected.state.keys() & found.state.keys()
        if expected.state[name].tobytes() != found.state[name].tobytes()
    ]
    for kind in ("step", "epoch"):
        rows = [[{**row, "seconds": 0} for row in output.read_metrics(run, kind)] for run in (straight, work)]
        if rows[0] != rows[1]:
            problems.append(f"its {len(rows[1])} rows of kind {kind} are not the {len(rows[0])} of the other")
    names = [sorted(path.name for path in run.iterdir()) for run in (straight, work)]
    return problems if names[0] == names[1] else [*problems, f"files {names[1]} are not {names[0]}"]


def is_rank(pid: int) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return b"\0OMPI_COMM_WORLD_RANK=" in variables or b"\0HOROVOD_RANK=" in variables


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--recipes", nargs="+", default=["linear_regression_torch", "cnn_torch"])
    parser.add_argument("--launcher", default="mpirun")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(table(drills(given.times, recipes=given.recipes, launcher=given.launcher, seed=given.seed)))

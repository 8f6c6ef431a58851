"""N workers against one: runs a recipe at several sizes, and compares losses and final weights.

The recipe is one that trains through `toolkit.run.Run`. It is run as its user runs it, in real
processes, with the same global batch and a bounded number of steps, each size twice; on CPUs, unless its command or
HVDKIT_DEVICE in the environment names a device.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit import checkpoint, devices
from toolkit.errors import UsageError

_ADDED = ("--output", "--max-steps", "--check-sync", "--resume", "--batch-size", "--folds")


@dataclass(frozen=True)
class Outcome:
    """What one run of a recipe left.

    Attributes:
        losses: float64, one a step, the mean over each global batch.
        weights: the model's tensors at the end, by name.
        steps_per_epoch: steps in each epoch, the last of which has what is left of the samples.
        error: the run's own last words where it failed; then the rest is empty.
        began: whether it came as far as making its directory, or was still under way when its time was up.
    """

    losses: np.ndarray
    weights: Mapping[str, np.ndarray]
    steps_per_epoch: int = 0
    error: str = ""
    began: bool = True


@dataclass(frozen=True)
class Comparison:
    """How far one run is from the run that it is held against.

    Attributes:
        loss: largest relative difference of a step's loss.
        first_step: the first step, from 1, whose loss differs by more than the tolerance; None: none does.
        weight: largest difference in a tensor, relative to the tensor's largest magnitude.
        tensor: the name of that tensor.
    """

    loss: float
    first_step: int | None
    weight: float
    tensor: str

    def passes(self, tolerance: float) -> bool:
        """Whether losses and weights are within the tolerance."""
        return self.loss <= tolerance and self.weight <= tolerance


@dataclass(frozen=True)
class Recipe:
    """A command that trains through `toolkit.run.Run`, and how to run it.

    Attributes:
        command: as its user types it for one worker, such as ["python", "recipes/cnn_torch.py"].
        timeout: seconds after which a run counts as failed.
    """

    command: Sequence[str]
    timeout: float = 600

    def __post_init__(self) -> None:
        given = {part.split("=")[0] for part in self.command}
        clash = [flag for flag in _ADDED if flag in given]
        if clash:
            raise UsageError(f"the recipe's command has {clash[0]}: leave it out, verify needs it its own way.")

    def run(self, size: int, steps: int) -> Outcome:
        """Train on `size` workers for `steps` steps, checking after each that the ranks hold the same model.

        Raises:
            UsageError: the command can't be started, or is no recipe.
        """
        with tempfile.TemporaryDirectory(prefix="hvdkit-verify-") as directory:
            output = Path(directory) / "run"
            line = [*self.command, "--max-steps", str(steps), "--output", str(output), "--check-sync", "1"]
            if size > 1:
                mpirun = shutil.which("mpirun") or str(Path(sys.executable).with_name("mpirun"))
                line = [mpirun, "-np", str(size), "--oversubscribe", "--bind-to", "none", *line]
            # One worker would take a GPU that several leave alone, and the two are alike in fewer digits.
            ours = {devices.VARIABLE: "cpu", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            environment = {**ours, **os.environ}
            try:
                process = subprocess.Popen(
                    line,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise UsageError(f"{error.filename} is not found: give a command that runs.") from None
            except OSError as error:
                raise UsageError(f"{line[0]} can't be run ({error.strerror}): give a command that runs.") from None
            try:
                _, printed = process.communicate(timeout=self.timeout)
            except BaseException as error:
                end(process)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                return _failed(f"the run did not end within {self.timeout:g} s")
            return _failed(last_words(printed), output.exists()) if process.returncode else _read(output)


def end(process: subprocess.Popen) -> None:
    """End a launcher by SIGTERM, at which it ends its workers; only if it lingers by SIGKILL.

    It is in a session of its own: a terminal's Ctrl-C would reach it too, and at a second signal mpirun leaves its
    workers to themselves, which write on. Hence another Ctrl-C has to wait meanwhile.
    """
    process.terminate()
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    finally:
        signal.signal(signal.SIGINT, heard)


def _failed(error: str, began: bool = True) -> Outcome:
    return Outcome(np.zeros(0), {}, error=error, began=began)


def last_words(printed: str) -> str:
    """Of what a failed run has printed, the line that says why."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"(\[rank .*\] )?error: |\w*(Error|Exception|Interrupt)\b.*:", line)]
    return (said or lines or ["the run failed and printed nothing"])[0].removeprefix("error: ")


def _read(output: Path) -> Outcome:
    found = checkpoint.newest(output)
    if found is None:
        raise UsageError("the command left no checkpoint in its --output: it must train through toolkit.run.Run.")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return Outcome(
        np.array([row["loss"] for row in rows if row["kind"] == "step"]),
        {name: array for name, array in found.state.items() if name.startswith("model/")},
        -(-found.manifest["samples"] // found.manifest["global_batch_size"]),
    )


def compare(reference: Outcome, outcome: Outcome, tolerance: float) -> Comparison:
    """Hold a run's losses and weights against another's, of the same framework or of two."""
    steps = min(len(reference.losses), len(outcome.losses))
    ours, theirs = outcome.losses[:steps], reference.losses[:steps]
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(ours == theirs, 0.0, np.abs(ours - theirs) / np.abs(theirs))
    relative = np.nan_to_num(relative, nan=np.inf)
    if len(reference.losses) != len(outcome.losses):
        relative = np.append(relative, np.inf)
    above = np.flatnonzero(relative > tolerance)
    weight, tensor = max(_weight_differences(reference.weights, outcome.weights), default=(np.inf, "no tensor"))
    return Comparison(relative.max(initial=0.0), int(above[0]) + 1 if len(above) else None, weight, tensor)


def _weight_differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> list[tuple[float, str]]:
    """(difference, name) of each tensor; between two frameworks, of each tensor's sorted values."""
    if a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a):
        pairs = [(name, a[name].ravel(), b[name].ravel()) for name in a]
    else:
        ordered = [sorted((np.sort(v.ravel()).tolist(), name) for name, v in state.items()) for state in (a, b)]
        left, right = (sorted(state, key=lambda item: len(item[0])) for state in ordered)
        if [len(values) for values, _ in left] != [len(values) for values, _ in right]:
            return [(np.inf, "the models' tensors are of other sizes")]
        pairs = [(name, np.array(v), np.array(w)) for (v, name), (w, _) in zip(left, right, strict=True)]
    differences = []
    for name, v, w in pairs:
        v, w = v.astype(np.float64), w.astype(np.float64)
        difference = np.abs(v - w).max(initial=0.0) / (np.abs(v).max(initial=0.0) or 1.0)
        differences.append((float(np.nan_to_num(difference, nan=np.inf)), name))
    return differences


def explain(recipe: Recipe, size: int, outcome: Outcome, comparison: Comparison, tolerance: float) -> str:
    """What is wrong with a run on `size` workers that differs from one worker's, as far as runs can tell."""
    first = comparison.first_step
    if first == 1:
        return (
            "the first step's loss differs, though all ranks hold the same weights: together the workers see "
            "other samples than one does (sharding), draw other random numbers for them (augmentation, dropout; "
            "Batch.generators() depend on the sample alone), or do not weight unequal parts"
        )
    if first is not None and first % outcome.steps_per_epoch == 0:
        return (
            f"losses part at step {first}, an epoch's last batch, which may be smaller: its parts are not "
            "weighted (Batch.weight)"
        )
    start, one, many = recipe.run(1, 0), recipe.run(1, 1), recipe.run(size, 1)
    if not (start.error or one.error or many.error):
        step, other = (
            np.concatenate([(o.weights[n].astype(np.float64) - start.weights[n]).ravel() for n in start.weights])
            for o in (one, many)
        )
        ratio = float(step @ other / (step @ step))
        straight = float(step @ other) ** 2 > 0.999 * float(step @ step) * float(other @ other)
        if straight and abs(ratio - 1) > max(tolerance, 1e-3):
            return (
                f"the first update is {ratio:.3g} times one worker's: the learning rate is scaled though the "
                "global batch is not larger, or gradients are summed instead of averaged"
            )
    return f"losses part at step {first}" if first else "losses agree but the final weights differ"

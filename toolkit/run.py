"""What every training loop needs around it: this rank's batches, resume, progress, metrics, checkpoints."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from toolkit import checkpoint, schedule
from toolkit.adapters import Adapter
from toolkit.errors import RanksDiffer, UsageError
from toolkit.options import RunOptions
from toolkit.progress import Progress
from toolkit.sharding import Part, Sharding
from toolkit.world import World

_FLUSH_STEPS = 50  # steps whose losses are averaged over the ranks in one collective operation
# Options that may change when a run is resumed. The global batch's size, which must not, is kept as it came out.
_FREE_OPTIONS = [
    "epochs",
    "batch_size",
    "global_batch_size",
    "output",
    "resume",
    "keep",
    "checkpoint_every",
    "print_every",
    "max_steps",
    "check_sync",
    "no_tuning",
    "verbose",
]


class Batch(NamedTuple):
    """This rank's part of a global batch.

    Attributes:
        x: inputs, shape (n, …), n ≥ 1.
        y: targets, shape (n, …).
        weight: what to multiply the mean loss over the n samples with; see `toolkit.sharding`.
    """

    x: np.ndarray
    y: np.ndarray
    weight: float


@dataclass
class _Position:
    """Where the run stands; written to every checkpoint."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # over the steps of the unfinished epoch


class Run:
    """A training run: enter it to start or resume, iterate it for batches, leave it to end.

    Entering gives every rank rank 0's state (or, with `--resume`, the newest whole checkpoint's).

    Args:
        options: the recipe's options.
        world: what `start` returned.
        adapter: the adapter in use.
        model: the model.
        optimizer: the distributed optimizer.
        samples: number of training samples.

    Attributes:
        name: the script's, which names the default output directory, `runs/<name>-001`.
        epoch: epochs finished.
        step: steps taken.
        sharding: how samples are cut into batches and parts.

    Raises:
        UsageError: on entering: the output directory holds another run, or there is none to resume.
    """

    def __init__(
        self,
        options: RunOptions,
        world: World,
        adapter: Adapter,
        model: Any,
        optimizer: Any,
        samples: int,
    ) -> None:
        self.options, self.world, self.adapter = options, world, adapter
        self.model, self.optimizer = model, optimizer
        self.name = Path(sys.argv[0]).stem
        batch = min(options.samples_per_step(world), samples)
        self.sharding = Sharding(samples, batch, world.size, options.seed, options.accumulation_steps)
        self._at = _Position()
        self._losses: list[Any] = []  # this pass's or earlier ones' of an unfinished step
        self._rows: list[dict[str, Any]] = []

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._at.epoch

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._at.step

    @property
    def finished(self) -> bool:
        """Whether all epochs, or `--max-steps`, are done."""
        most = self.options.max_steps
        return self.epoch >= self.options.epochs or (most is not None and self.step >= most)

    def __enter__(self) -> Run:
        self.directory, found = self._agree_on_directory()
        if found is not None:
            self.adapter.import_state(self.model, self.optimizer, found.state)
            self._at = _Position(**found.manifest["position"])
        self.adapter.broadcast_state(self.model, self.optimizer)
        if self.world.rank == 0:
            self._open_metrics()
        self.progress = Progress(self.world, self.options.epochs * self.sharding.steps_per_epoch, self.step)
        if self.world.rank == 0:
            begin = f"resumed at epoch {self.epoch}, step {self.step}" if found else "new run"
            self.progress.line(
                f"{self.name}: {begin} in {self.directory}; {self.world.size} worker(s), "
                f"{self.sharding.global_batch_size} samples a step"
            )
        if found is not None and self.finished:
            self.progress.line(f"this run is complete already: give more than --epochs {self.options.epochs} to go on")
        if self.options.check_sync:
            self.check_sync()
        if self.options.max_steps == 0:
            self.save()
        self._epoch_began = time.perf_counter()
        return self

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left; the loop's body ends with `end_epoch`."""
        while not self.finished:
            number = self.epoch
            yield number
            if self.epoch == number and not self.finished:
                raise RuntimeError("the epoch's loop did not call run.end_epoch(): call it once after the batches.")

    @property
    def steps_left_in_epoch(self) -> int:
        """Steps from here to the end of the current epoch."""
        return self.sharding.steps_per_epoch - self._at.step_in_epoch

    @property
    def whole_epochs_until(self) -> int:
        """The epoch up to which Keras' `fit` can go in one call: the next one after a resume in mid-epoch."""
        return self.epoch + 1 if self._at.step_in_epoch else self.options.epochs

    def parts_left_in_epoch(self) -> Iterator[Part]:
        """This rank's passes of the current epoch, from where it stands; plain data, moves nothing on."""
        return self.sharding.parts(self.epoch, self.world.rank, self._at.step_in_epoch)

    def batches(self, data: Any) -> Iterator[Batch]:
        """This rank's batches of the current epoch, from where it stands; `log` is called once for each.

        Args:
            data: holds numpy arrays `x` and `y` of `samples` rows each.
        """
        for part in self.parts_left_in_epoch():
            logged = (self.step, len(self._losses))
            yield Batch(data.x[part.indices], data.y[part.indices], part.weight)
            if (self.step, len(self._losses)) == logged:
                raise RuntimeError("the loop did not call run.log(loss=…): call it once for each batch.")
            if self.finished:
                return

    def learning_rate(self) -> float:
        """The rate for the coming step: scaled with the global batch, warmed up to it."""
        reference = min(self.options.batch_size or self.options.global_batch_size, self.sharding.samples)
        scale = schedule.linear_scale(self.sharding.global_batch_size, reference)
        warmup_steps = round(self.options.warmup_epochs * self.sharding.steps_per_epoch)
        return self.options.learning_rate * scale * schedule.warmup(self.step, warmup_steps, 1 / scale)

    def log(self, *, loss: Any) -> None:
        """Note the weighted loss of the pass just done; the last pass of a step ends the step.

        Args:
            loss: a number or a scalar tensor; averaged over ranks and written with the step's row.
        """
        self._losses.append(loss.detach() if hasattr(loss, "detach") else loss)
        if len(self._losses) < self.options.accumulation_steps:
            return
        rate = self.learning_rate()
        self._at.step += 1
        self._at.step_in_epoch += 1
        self._rows.append({"epoch": self.epoch + 1, "step": self.step, "learning_rate": rate, "loss": self._losses})
        self._losses = []
        self.progress.advance(self.epoch)
        if len(self._rows) >= _FLUSH_STEPS:
            self._flush()
        if self.options.check_sync and self.step % self.options.check_sync == 0:
            self.check_sync()

    def check_sync(self) -> None:
        """Compare all ranks' parameters, buffers and optimizer state by their digests.

        Raises:
            RanksDiffer: they are not equal to the bit; on every rank.
        """
        digests = self.adapter.gather(self.adapter.digest(self.model, self.optimizer))
        names = [name for name in digests[0] if any(other.get(name) != digests[0][name] for other in digests)]
        if all(other == digests[0] for other in digests):
            return
        ranks = [rank for rank, other in enumerate(digests) if other != digests[0]]
        state = self.adapter.export_state(self.model, self.optimizer)
        first = self.adapter.gather({name: state[name] for name in names[:3] if name in state})
        differences = []
        for name in names[:3]:
            arrays = [np.asarray(held[name], np.float64) for held in first if name in held]
            same_shape = len({array.shape for array in arrays}) == 1 and len(arrays) == len(first)
            largest = max(np.abs(array - arrays[0]).max(initial=0) for array in arrays) if same_shape else np.inf
            differences.append(f"{name} (by up to {largest:.3g})")
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        when = f"after step {self.step}" if self.step else "before the first step"
        cause = "is the optimizer distributed?" if self.step else "was the initial state broadcast?"
        raise RanksDiffer(
            f"{when}, ranks {', '.join(map(str, ranks))} differ from rank 0 in {', '.join(differences)}{more}: {cause}"
        )

    def end_epoch(self, **metrics: float) -> dict[str, float]:
        """End an epoch: print its line, write its row and, when due, a checkpoint.

        Args:
            metrics: values of the whole epoch, the same on all ranks, such as `test_accuracy`.

        Returns:
            The epoch's row, with `train_loss`: the mean over its steps. Empty where `--max-steps`
            ended the run within the epoch.
        """
        self._flush()
        if self.steps_left_in_epoch > 0:  # --max-steps ends the run here
            self.save()
            return {}
        loss = self._at.loss_sum / self.sharding.steps_per_epoch
        self._at = _Position(self.epoch + 1, self.step)
        seconds = time.perf_counter() - self._epoch_began
        self._epoch_began = time.perf_counter()
        row: dict[str, float] = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": loss,
            **metrics,
            "seconds": round(seconds, 4),
        }
        self._write_row("epoch", row)
        if self.finished or self.epoch % self.options.print_every == 0:
            shown = {"loss": loss, **metrics}
            text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
            self.progress.line(f"epoch {self.epoch}/{self.options.epochs}  {text}  {seconds:.2f} s")
        if self.finished or self.epoch % self.options.checkpoint_every == 0:
            self.save()
        return row

    def save(self) -> Path:
        """Rank 0 writes a checkpoint of this moment; all ranks call it, and hold the same model."""
        if self.options.check_sync:
            self.check_sync()
        path = self.directory / f"step-{self.step:08d}"
        if self.world.rank == 0:
            state = self.adapter.export_state(self.model, self.optimizer)
            manifest = {
                **self._identity(),
                "world_size": self.world.size,
                "position": asdict(self._at),
            }
            path = checkpoint.write(self.directory, self.step, state, manifest, self.options.keep)
        return path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        if kind is None and self.world.rank == 0:
            newest = checkpoint.steps(self.directory)
            self.progress.line(f"checkpoint: {newest[-1]}" if newest else "no checkpoint was written")
        if self.world.rank == 0:
            self._metrics.close()

    def _flush(self) -> None:
        """Average the noted losses over the ranks; rank 0 writes the rows."""
        if not self._rows:
            return
        local = np.array([np.mean([float(loss) for loss in row["loss"]]) for row in self._rows])
        losses = self.adapter.average({"loss": local})["loss"]
        for row, loss in zip(self._rows, losses, strict=True):  # type: ignore[arg-type]
            self._at.loss_sum += float(loss)
            self._write_row("step", {**row, "loss": float(loss)})
        self._rows = []

    def _write_row(self, kind: str, row: dict[str, Any]) -> None:
        if self.world.rank == 0:
            self._metrics.write(json.dumps({"kind": kind, **row}) + "\n")
            self._metrics.flush()

    def _agree_on_directory(self) -> tuple[Path, checkpoint.Checkpoint | None]:
        """Rank 0 finds the output directory and what to resume; every rank gets its answer."""
        answer: Any = None
        if self.world.rank == 0:
            try:
                answer = self._find_directory()
            except UsageError as error:
                answer = error
        answer = self.adapter.gather(answer)[0]
        if isinstance(answer, UsageError):
            raise answer
        return answer

    def _find_directory(self) -> tuple[Path, checkpoint.Checkpoint | None]:
        options, runs = self.options, Path("runs")
        numbers = [p.name.removeprefix(f"{self.name}-") for p in runs.glob(f"{self.name}-[0-9]*") if p.is_dir()]
        last = max((int(number) for number in numbers if number.isdecimal()), default=0)
        if options.resume:
            directory = options.output or (runs / f"{self.name}-{last:03d}" if last else None)
            if directory is None:
                raise UsageError(f"--resume found no run of {self.name} under {runs}/: name one with --output.")
            found = checkpoint.newest(directory)
            if found is None:
                raise UsageError(
                    f"--resume found no whole checkpoint in {directory}: choose another --output to begin anew."
                )
            self._check_same_run(found)
            return directory, found
        if options.output is None:
            return _new_directory(runs, self.name, last + 1), None
        directory = options.output
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UsageError(f"{directory} is not an empty directory: choose another --output, or add --resume.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {directory} can't be made: {error.strerror}.") from None
        return directory, None

    def _check_same_run(self, found: checkpoint.Checkpoint) -> None:
        """Refuse to continue a run whose position would mean other samples here."""
        for key, value in self._identity().items():
            if found.manifest.get(key) != value:
                raise UsageError(
                    f"--resume: {found.path} was made with {key} {found.manifest.get(key)}, "
                    f"this run has {key} {value}: give the options that it was made with."
                )

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have alike to be the same run: the recipe, its data, its own options."""
        own = {name: value for name, value in vars(self.options).items() if name not in _FREE_OPTIONS}
        return {
            "recipe": self.name,
            "samples": self.sharding.samples,
            "global_batch_size": self.sharding.global_batch_size,
            **{name: value for name, value in own.items() if isinstance(value, bool | int | float | str)},
        }

    def _open_metrics(self) -> None:
        """Open metrics.jsonl for more rows; rows after the resumed step are written again."""
        path = self.directory / "metrics.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if self._is_past(line)]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, path)
        self._metrics = path.open("a")

    def _is_past(self, line: str) -> bool:
        try:
            return json.loads(line)["step"] <= self.step
        except (ValueError, KeyError, TypeError):
            return False  # a row that a killed run left unfinished


def _new_directory(runs: Path, name: str, number: int) -> Path:
    """Make `<name>-<number>` under `runs`, or with the next number that no other run takes meanwhile."""
    while True:
        directory = runs / f"{name}-{number:03d}"
        try:
            directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UsageError(f"{directory} can't be made: {error.strerror}; name another with --output.") from None

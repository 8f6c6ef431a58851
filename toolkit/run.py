"""What every training loop needs around it: this rank's batches, resume, progress, metrics, checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from toolkit import checkpoint, output, plain, schedule, watch
from toolkit.adapters import Adapter
from toolkit.audit import Audit
from toolkit.errors import RunFailed, UsageError
from toolkit.options import RunOptions
from toolkit.progress import Progress
from toolkit.random_streams import sample_generator
from toolkit.sharding import Part, Sharding
from toolkit.sync import SyncCheck
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
    "checkpoint_steps",
    "print_every",
    "max_steps",
    "check_sync",
    "audit",
    "fold_groups",
    "deterministic",
    "stall_timeout",
    "no_tuning",
    "verbose",
]
Item = TypeVar("Item")


class Batch(NamedTuple):
    """This rank's part of a global batch.

    Attributes:
        x: inputs, shape (n, …), n ≥ 1.
        y: targets, shape (n, …).
        weight: what to multiply the mean loss over the n samples with; see `toolkit.sharding`.
        indices: the samples' places in the data: int64, shape (n,).
        epoch: from 0.
        seed: the run's.
    """

    x: np.ndarray
    y: np.ndarray
    weight: float
    indices: np.ndarray
    epoch: int
    seed: int

    def generators(self) -> Iterator[np.random.Generator]:
        """A random stream for each sample, the same whichever rank has it; see `toolkit.random_streams`."""
        return (sample_generator(self.seed, self.epoch, index) for index in self.indices)


@dataclass
class _Position:
    """Where the run stands; written to every checkpoint."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # over the steps of the unfinished epoch


class Run:
    """A training run: enter it to start or resume, iterate it for batches, leave it to end.

    Entering gives every rank rank 0's state (or, with `--resume`, the newest whole checkpoint's) and
    seeds the random generators, the framework's of each rank differently.

    Args:
        options: the recipe's options.
        world: what `start` returned.
        adapter: the adapter in use.
        model: the model.
        optimizer: the distributed optimizer.
        samples: number of training samples.
        extra: names to more objects with `state_dict()` and `load_state_dict()` that checkpoints hold, such as
            a learning-rate scheduler or a GradScaler; rank 0's, of plain values.

    Attributes:
        name: the script's, which names the default output directory, `runs/<name>-001`.
        epoch: epochs finished.
        step: steps taken.
        sharding: how samples are cut into batches and parts.

    Raises:
        UsageError: the optimizer accumulates another number of passes than the options say, or `--folds` is given
            to a script without `each_fold`; on entering: the output directory holds another run, or there is none
            to resume.
    """

    def __init__(
        self,
        options: RunOptions,
        world: World,
        adapter: Adapter,
        model: Any,
        optimizer: Any,
        samples: int,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.options, self.world, self.adapter = options, world, adapter
        self.model, self.optimizer = model, optimizer
        self.name = script_name()
        passes = getattr(optimizer, "passes_per_step", options.accumulation_steps)
        if passes != options.accumulation_steps:
            raise UsageError(
                f"--accumulation-steps is {options.accumulation_steps} and the optimizer accumulates {passes}: "
                "pass accumulation_steps=options.accumulation_steps to distribute()."
            )
        if options.folds is not None and options.fold is None:
            raise UsageError("--folds is given, and the script trains no folds: have it loop over each_fold().")
        batch = min(options.samples_per_step(world), samples)
        self.sharding = Sharding(samples, batch, world.size, options.seed, options.accumulation_steps, options.sharding)
        self._at = _Position()
        self._losses: list[Any] = []  # this pass's or earlier ones' of an unfinished step
        self._rows: list[dict[str, Any]] = []
        self._part: Part | None = None  # what `follow` handed out last
        self._sync = SyncCheck(adapter, options.check_sync)
        self._audit = Audit(adapter, samples) if options.audit else None
        self._reference = min(options.batch_size or options.global_batch_size, samples)  # the rate is for this batch
        self._extra = dict(extra or {})
        self._stopped = self._save_is_due = False
        self._writer = checkpoint.Writer()

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
        """Whether all epochs, or `--max-steps`, are done, or `stop` was called."""
        most = self.options.max_steps
        return self._stopped or self.epoch >= self.options.epochs or (most is not None and self.step >= most)

    def stop(self) -> None:
        """End the run here, with a checkpoint; all ranks call it, between steps or epochs."""
        self._stopped = True
        self.save()

    def __enter__(self) -> Run:
        self.directory, found = self._agree_on_directory()
        watch.directory(self.directory)
        self._take_up(found)
        self._origin = self.adapter.describe(self.model)
        if self.world.rank == 0:
            self._metrics = output.Metrics(self.directory, self.step)
        steps = self.options.epochs * self.sharding.steps_per_epoch
        prefix = f"fold {self.options.fold}: " if self.options.fold else ""
        self.progress = Progress(self.world, steps, self.step, prefix)
        begin = f"resumed at epoch {self.epoch}, step {self.step}" if found else "new run"
        self.progress.line(
            f"{self.name}: {begin} in {self.directory}; {self.world.size} worker(s), "
            f"{self.sharding.global_batch_size} samples a step"
        )
        if found is not None and self.finished:
            more = f"--epochs {self.epoch}" if self.epoch >= self.options.epochs else f"--max-steps {self.step}"
            self.progress.line(f"this run is complete already: give more than {more} to go on")
        if self.options.check_sync != 0:
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
                raise RuntimeError(
                    "the epoch was not ended: take all of its batches and call run.end_epoch() once after them, "
                    "or run.stop() to end the run."
                )

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
        epoch, seed = self.epoch, self.options.seed
        parts = self.parts_left_in_epoch()
        return self.follow(
            (part, Batch(data.x[part.indices], data.y[part.indices], part.weight, part.indices, epoch, seed))
            for part in parts
        )

    def follow(self, batches: Iterable[tuple[Part, Item]]) -> Iterator[Item]:
        """Hand on batches that another pipeline loads, and see to it that each is logged.

        Args:
            batches: the current epoch's, in the order of `parts_left_in_epoch`, each with the samples
                that it holds and their weight.
        """
        if self.finished:
            raise RuntimeError("the run is finished: loop over run.epochs(), which then ends.")
        watch.doing(f"loading the batch of step {self.step + 1}")
        for part, batch in batches:
            self._part = part
            watch.doing(f"training at step {self.step + 1}")
            yield batch
            if self._part is not None:
                raise RuntimeError("the loop did not call run.log(loss=…): call it once for each batch.")
            if self.finished:
                return

    def learning_rate(self) -> float:
        """The rate for the coming step: scaled with the global batch, warmed up to it."""
        scale = schedule.linear_scale(self.sharding.global_batch_size, self._reference)
        warmup_steps = round(self.options.warmup_epochs * self.sharding.steps_per_epoch)
        return self.options.learning_rate * scale * schedule.warmup(self.step, warmup_steps, 1 / scale)

    def log(self, *, loss: Any, part: Part | None = None) -> None:
        """Note the weighted loss of the pass just done; the last pass of a step ends the step.

        Args:
            loss: a number or a scalar tensor; averaged over ranks and written with the step's row.
            part: the samples that the pass used, for `--audit`; those handed out last by `batches` if None.
        """
        part, self._part = part or self._part, None
        if self._audit and part is not None and part.weight:
            self._audit.note(part.indices)
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
        if self._sync.due(self.step):
            self.check_sync()
        # An epoch's last step is saved by end_epoch, as the begin of the next epoch; others at once, before an
        # evaluation that the uninterrupted run does not have here can draw random numbers.
        if self.steps_left_in_epoch > 0 and (self.finished or self._saves_after(self.step)):
            self.save()
        inside = self.steps_left_in_epoch > 0
        watch.doing(f"loading the batch of step {self.step + 1}" if inside else f"ending epoch {self.epoch + 1}")

    def check_sync(self) -> None:
        """Compare all ranks' parameters, buffers and optimizer state by their digests.

        Raises:
            RanksDiffer: they are not equal to the bit; on every rank.
        """
        self._sync.compare(self.model, self.optimizer, self.step)

    def end_epoch(self, **metrics: float) -> dict[str, float]:
        """End an epoch: print its line, write its row and, when due, a checkpoint.

        Args:
            metrics: values of the whole epoch, the same on all ranks, such as `test_accuracy`.

        Returns:
            The epoch's row, with `train_loss`: the mean over its steps. Empty where `--max-steps`
            ended the run within the epoch.

        Raises:
            SamplesDiffer: with `--audit`: the ranks did not use each sample once; on every rank.
        """
        self._flush()
        if self.steps_left_in_epoch > 0:  # --max-steps ends the run here, or the loop's own decision
            if not self.finished:
                self.save()
            return {}
        if self._audit:
            self.progress.line(self._audit.end_epoch(self.epoch + 1))
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
        due = self._saves_after(self.step) or self._save_is_due
        if self.finished or self.epoch % self.options.checkpoint_every == 0 or due:
            self.save()
        return row

    def save(self) -> None:
        """Save a checkpoint of this moment; all ranks call it, between steps, and hold the same model.

        Rank 0 takes a copy of the state, and writes it while training goes on. After an epoch's last step it
        is saved by `end_epoch`.

        Raises:
            RuntimeError: called between the passes of a step.
            RanksDiffer: the ranks do not hold the same model.
            RunFailed: on rank 0: the checkpoint before this one could not be written.
        """
        if self._losses:
            raise RuntimeError("run.save() between the passes of a step: call it after the step's last pass.")
        self._save_is_due = self.steps_left_in_epoch == 0
        if self._save_is_due:
            return
        self._flush()
        if self.options.check_sync != 0 and not self._sync.has_compared(self.step):
            self.check_sync()
        self._wait_for_writer()  # before there is another copy of the state
        local = self.adapter.gather(self.adapter.export_local(self.model))
        counts = {"audit/counts": self._audit.counts()} if self._audit else {}
        if self.world.rank == 0:
            state = {
                **self.adapter.export_state(self.model, self.optimizer),
                **_means(local),
                **counts,
                **{f"rank{r}/{name}": array for r, state in enumerate(local) for name, array in state.items()},
            }
            self._writer.write(self.directory, self.step, state, self._manifest(), self.options.keep)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watch.leaving(error)
        self.progress.close()
        if self.world.rank == 0:
            self._metrics.close()
            if kind is not None:
                self._writer.close()
            else:
                self._wait_for_writer()
                newest = checkpoint.steps(self.directory)
                self.progress.line(f"checkpoint: {newest[-1]}" if newest else "no checkpoint was written")

    def _wait_for_writer(self) -> None:
        try:
            self._writer.wait()
        except OSError as error:
            reason = error.strerror or error
            raise RunFailed(f"a checkpoint could not be written to {self.directory}: {reason}") from None

    def _saves_after(self, step: int) -> bool:
        every = self.options.checkpoint_steps
        return every is not None and step % every == 0

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
            self._metrics.write(kind, row)

    def _agree_on_directory(self) -> tuple[Path, checkpoint.Checkpoint | None]:
        """Rank 0 finds the output directory and what to resume; every rank gets its answer, and its own state."""
        saved: dict[str, np.ndarray] = {}  # on rank 0

        def decide() -> tuple[Path, tuple[Path, dict[str, Any], list[str]] | None]:
            directory = output.choose(self.name, self.options.output, self.options.resume)
            if not self.options.resume:
                return directory, None
            found = output.to_resume(directory)
            self._check_same_run(found)
            saved.update(found.state)
            return directory, (found.path, found.manifest, list(found.state))

        directory, told = output.decided_by_rank_0(self.world, self.adapter, decide)
        if told is None:
            return directory, None
        path, manifest, names = told
        state = {}
        for name in names:  # one by one: MPI sends 2 GiB at most at once
            array = self.adapter.gather(saved.get(name))[0]
            if not name.startswith("rank") or name.startswith(f"rank{self.world.rank}/"):
                state[name] = array
        return directory, checkpoint.Checkpoint(path, manifest, state)

    def _take_up(self, found: checkpoint.Checkpoint | None) -> None:
        """Begin with rank 0's state, or with a checkpoint's."""
        adapter, world, seed, local = self.adapter, self.world, self.options.seed, None
        if found is not None:
            shared = {name: a for name, a in found.state.items() if name.startswith(("model/", "optimizer/"))}
            adapter.import_state(self.model, self.optimizer, shared)
            self._at = _Position(**found.manifest["position"])
            self._reference = found.manifest["reference_batch_size"]
            for name, saved in found.manifest["extra"].items():
                self._extra[name].load_state_dict(plain.decode(saved))
            prefix = f"rank{world.rank}/"
            if found.manifest["world_size"] == world.size:
                local = {n.removeprefix(prefix): a for n, a in found.state.items() if n.startswith(prefix)}
            if self._audit and "audit/counts" in found.state:
                self._audit.restore(found.state["audit/counts"])
        else:
            adapter.broadcast_state(self.model, self.optimizer)
        if local is not None:
            adapter.import_local(self.model, local)
        else:  # other workers than before draw other numbers than before
            mixed = np.random.SeedSequence([seed, self.step]).generate_state(1)[0] if self.step else seed
            adapter.seed_local(self.model, int(mixed), world.rank)

    def _check_same_run(self, found: checkpoint.Checkpoint) -> None:
        """Refuse to continue a run whose position would mean other samples here."""
        if self._audit and found.manifest["position"]["step_in_epoch"] and "audit/counts" not in found.state:
            raise UsageError(
                f"--audit: {found.path} lies within an epoch whose samples were not counted: resume without --audit."
            )
        for key, value in self._identity().items():
            if found.manifest.get(key) != value:
                raise UsageError(
                    f"--resume: {found.path} was made with {key} {found.manifest.get(key)}, "
                    f"this run has {key} {value}: give the options that it was made with, or choose another --output."
                )

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have alike to be the same run: the recipe, its data, its own options."""
        own = {name: value for name, value in vars(self.options).items() if name not in _FREE_OPTIONS}
        return {
            "recipe": self.name,
            "samples": self.sharding.samples,
            "global_batch_size": self.sharding.global_batch_size,
            "optimizer": type(self.optimizer).__name__,
            "extra_objects": sorted(self._extra),
            **{name: value for name, value in own.items() if isinstance(value, bool | int | float | str | None)},
        }

    def _manifest(self) -> dict[str, Any]:
        """Everything that an exact resume needs beside the arrays."""
        return {
            **self._origin,
            **self._identity(),
            "world_size": self.world.size,
            "position": asdict(self._at),
            "reference_batch_size": self._reference,
            "learning_rate_of_next_step": self.learning_rate(),
            "extra": {name: plain.encode(name, thing.state_dict()) for name, thing in self._extra.items()},
        }


def script_name() -> str:
    """The running script's name, which names its runs."""
    return Path(sys.argv[0]).stem


def _means(local: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean over the ranks of what each keeps of the model for itself; of integers, rank 0's."""
    return {
        name: np.mean([state[name] for state in local], axis=0, dtype=np.float64).astype(array.dtype)
        if np.issubdtype(array.dtype, np.floating)
        else array
        for name, array in local[0].items()
        if name.startswith("model/")
    }

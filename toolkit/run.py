"""What every training loop needs around it: this rank's batches, resume, progress, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from toolkit import checkpoint, elastic, ending, output, plain, reading, schedule, step_times, watch
from toolkit.adapters import Adapter
from toolkit.agreement import Agreement
from toolkit.audit import Audit
from toolkit.claim import PATIENCE, Claim
from toolkit.errors import RunFailed, UsageError
from toolkit.gpu_usage import GpuUsage
from toolkit.options import RunOptions
from toolkit.progress import Progress
from toolkit.random_streams import sample_generator
from toolkit.sharding import Part, Sharding
from toolkit.stopping import resume_command
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
    "commit_steps",
    "print_every",
    "max_steps",
    "check_sync",
    "audit",
    "on_nan",
    "fold_groups",
    "reducer",
    "deterministic",
    "stall_timeout",
    "device",
    "share_gpus",
    "no_tuning",
    "verbose",
]
_HOPELESS = 10  # steps left out in a row that end a run, where its epochs are no longer
_LAST_WRITE = 5.0  # seconds that an exception waits for the checkpoint that is being written
Item = TypeVar("Item")


class Batch(NamedTuple):
    """This rank's part of a global batch.

    Attributes:
        x: inputs, shape (n, …), n ≥ 1: a numpy array, or of `Run.tensors` the framework's tensor.
        y: targets, shape (n, …), likewise.
        weight: what to multiply the mean loss over the n samples with; see `toolkit.sharding`.
        indices: the samples' places in the data: int64, shape (n,).
        epoch: from 0.
        seed: the run's.
    """

    x: Any
    y: Any
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
    loss_sum: float = 0.0  # over the steps of the unfinished epoch, but for the next
    not_finite: int = 0  # steps of the unfinished epoch whose loss or gradients were not finite


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
        UsageError: the optimizer accumulates another number of passes or compresses otherwise than the options say, or
            `--folds` is given to a script without `each_fold`; on entering: the output directory holds another run, or
            there is none to resume.
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
        self._compression = getattr(optimizer, "compression", options.compression)
        if options.compression not in ("none", self._compression):
            raise UsageError(
                f"--compression is {options.compression} and the optimizer's {self._compression}: "
                "pass compression=options.compression to distribute()."
            )
        if options.folds is not None and options.fold is None:
            raise UsageError("--folds is given, and the script trains no folds: have it loop over each_fold().")
        batch = min(options.samples_per_step(world), samples)
        self.sharding = Sharding(samples, batch, world.size, options.seed, options.accumulation_steps, options.sharding)
        self._at = _Position()
        self._losses: list[Any] = []  # this pass's or earlier ones' of an unfinished step
        self._rows: list[dict[str, Any]] = []
        self._part: Part | None = None  # what `follow` handed out last
        self._cuts: reading.Cuts | None = None  # handed out last
        self._sync = SyncCheck(adapter, options.check_sync)
        self._gpu_usage = GpuUsage(adapter)
        self._audit = Audit(adapter, samples) if options.audit else None
        self._reference = min(options.batch_size or options.global_batch_size, samples)  # the rate is for this batch
        self._extra = dict(extra or {})
        self._stopped = self._save_is_due = False
        self._agreement = Agreement(adapter, world, options.on_nan, lambda line: self.progress.line(line))
        # Torch's has a flush(), as it holds a step's passes back; Keras' takes each as a step of its own.
        if options.on_nan == "skip" and passes > 1 and not hasattr(optimizer, "flush"):
            raise UsageError("--on-nan skip: Keras' optimizers can't leave a step of several passes out: give stop.")
        self._left_out = 0  # steps in a row, up to the last one
        self._statistics: dict[str, np.ndarray] | None = None  # from before the coming step, where they are kept
        self._claim: Claim | None = None  # rank 0's, on the output directory
        self._metrics: output.Metrics | None = None  # rank 0's
        self._membership = elastic.current()
        self._times = step_times.from_environment()
        self._writer = checkpoint.Writer(self._check_claim)

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
        """Whether all epochs, or `--max-steps`, are done, or the ranks have agreed to stop."""
        most = self.options.max_steps
        return self._stopped or self.epoch >= self.options.epochs or (most is not None and self.step >= most)

    def stop(self) -> None:
        """Ask for the run's end; one rank is enough. All ranks stop together, with a checkpoint, after a next step.

        The loop goes on until `finished`: one or two more steps are taken, but none where it is called between epochs.
        """
        self._agreement.ask_to_stop()

    def agree_to_stop(self) -> None:
        """Stop where any rank asked for it or got a signal; every rank calls it, between epochs.

        Raises:
            SystemExit: a rank got SIGTERM or SIGINT; on every rank, after the checkpoint is written.
            RunFailed: with `--on-nan stop`: a rank's last loss was not finite; on every rank.
        """
        self._agreement.between_epochs()
        if self._is_stopped_anew():
            self.save()
            self._commit()
        self._leave_if_told()

    def __enter__(self) -> Run:
        try:
            self._begin()
        except BaseException:  # in an elastic job the next attempt is made in this process
            if self.world.rank == 0:
                self._leave_directory(whole=False)
            self._agreement.end()
            raise
        return self

    def _begin(self) -> None:
        self.directory, found = self._agree_on_directory()
        watch.directory(self.directory)
        self._take_up(found)
        self._keep_statistics()
        self._origin = self.adapter.describe(self.model)
        if self.world.rank == 0:
            self._metrics = output.Metrics(self.directory, self.step, self._check_claim)
        steps = self.options.epochs * self.sharding.steps_per_epoch
        prefix = f"fold {self.options.fold}: " if self.options.fold else ""
        self.progress = Progress(self.world, steps, self.step, prefix)
        anew = "no checkpoint to resume yet, begun anew" if self.options.resume else "new run"
        begin = f"resumed at epoch {self.epoch}, step {self.step}" if found else anew
        if found is not None and self._membership is not None and self._membership.commit is not None:
            begin = f"going on from memory at epoch {self.epoch}, step {self.step}"
        self.progress.line(
            f"{self.name}: {begin} in {self.directory}; {self.world.size} worker(s), "
            f"{self.sharding.global_batch_size} samples a step"
        )
        if found is not None and self.finished and not self._stopped:
            more = f"--epochs {self.epoch}" if self.epoch >= self.options.epochs else f"--max-steps {self.step}"
            self.progress.line(f"this run is complete already: give more than {more} to go on")
        if self.options.check_sync != 0:
            self.check_sync()
        if self.options.max_steps == 0:
            self.save()
        # A worker of an elastic job that is told to stop leaves alone.
        self._agreement.begin(signals=self._membership is None)
        if self._membership is not None:
            self._commit(interrupt=False)  # from here on every worker can hand the run to those that come
            if found is not None and self.finished:
                self.save()  # rank 0 may have died while it wrote it
        self._epoch_began = time.perf_counter()

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left; the loop's body ends with `end_epoch`."""
        self.agree_to_stop()
        while not self.finished:
            number = self.epoch
            yield number
            self.agree_to_stop()
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
            data: holds numpy arrays `x` and `y` of `samples` rows each, in memory or mapped from files; they are not
                to be changed within an epoch, as batches may be cut ahead. A batch is a copy, the loop's own.

        Raises:
            UsageError: x or y has fewer rows.
        """
        return self._batches(self.cuts(data, self.parts_left_in_epoch()), self.epoch)

    def tensors(self, data: Any, prepare: Callable[[Batch], Any] = lambda batch: batch.x) -> Iterator[Batch]:
        """The same with `x` and `y` as the framework's tensors on this worker's device; see `Adapter.on_device`.

        Where a batch takes long to cut, prepare and copy, a thread does it while training goes on, up to two ahead.

        Args:
            data: as for `batches`.
            prepare: from a batch of numpy arrays to the model's input, an array too, such as adding a channel axis or
                augmentation. Its random numbers are `Batch.generators`', as those of global generators would be drawn
                at other times where the run is resumed.

        Raises:
            UsageError: x or y has fewer rows.
        """
        epoch, seed, on_device = self.epoch, self.options.seed, self.adapter.on_device

        def make(part: Part, x: Any, y: Any) -> tuple[Any, ...]:
            return on_device(prepare(Batch(x, y, part.weight, part.indices, epoch, seed)), y)

        return self._batches(self.cuts(data, self.parts_left_in_epoch(), make), epoch)

    def cuts(self, data: Any, parts: Iterable[Part], make: reading.Make = reading.as_cut) -> reading.Cuts:
        """The parts with their rows of `data.x` and `data.y`; see `toolkit.reading`. End with the run, or the next."""
        self._end_cuts()
        self._cuts = reading.read(data.x, data.y, parts, self.sharding.samples, make)
        return self._cuts

    def _end_cuts(self) -> None:
        if self._cuts is not None:
            self._cuts.close()
            self._cuts = None

    def _batches(self, cuts: reading.Cuts, epoch: int) -> Iterator[Batch]:
        seed = self.options.seed
        with contextlib.closing(cuts):  # also where the loop ends early
            yield from self.follow((part, Batch(x, y, part.weight, part.indices, epoch, seed)) for part, x, y in cuts)

    def follow(self, batches: Iterable[tuple[Part, Item]]) -> Iterator[Item]:
        """Hand on batches that another pipeline loads, and see to it that each is logged.

        Args:
            batches: the current epoch's, in the order of `parts_left_in_epoch`, each with the samples
                that it holds and their weight.
        """
        if self.finished:
            raise RuntimeError("the run is finished: loop over run.epochs(), which then ends.")
        watch.doing(f"loading the batch of step {self.step + 1}")
        if self._times is not None:
            self._times.begin()
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
        loss = float(loss.detach() if hasattr(loss, "detach") else loss)
        self._losses.append(loss)
        try:
            left_out = self._agreement.after_pass(loss, self.step + 1)
        except RunFailed:  # on every rank: the rows that lead there, and this step's, are what the user looks for
            self._rows.append(self._row(self.step + 1))
            self._flush()
            raise
        if len(self._losses) < self.options.accumulation_steps:
            return
        row = self._row(self.step + 1)
        self._at.step += 1
        self._at.step_in_epoch += 1
        self._rows.append({**row, "skipped": True} if left_out else row)
        self._losses = []
        self._keep_statistics(put_back=left_out)
        self._give_up_unless_finite(left_out)
        self.progress.advance(self.epoch)
        if len(self._rows) >= _FLUSH_STEPS:
            self._flush()
        if self._sync.due(self.step):
            self.check_sync()
        # An epoch's last step is saved by end_epoch, as the begin of the next epoch; others at once, before an
        # evaluation that the uninterrupted run does not have here can draw random numbers.
        self._is_stopped_anew()
        if self.steps_left_in_epoch > 0 and (self.finished or self._saves_after(self.step)):
            self.save()
        if self.steps_left_in_epoch > 0 and (self.finished or self.step % self.options.commit_steps == 0):
            self._commit()
        inside = self.steps_left_in_epoch > 0
        if inside:
            self._leave_if_told()
        watch.doing(f"loading the batch of step {self.step + 1}" if inside else f"ending epoch {self.epoch + 1}")
        if self._times is not None:
            self._times.end_step()

    def _row(self, step: int) -> dict[str, Any]:
        return {"epoch": self.epoch + 1, "step": step, "learning_rate": self.learning_rate(), "loss": self._losses}

    def _give_up_unless_finite(self, left_out: bool) -> None:
        """With `--on-nan skip`: end a run that has come to leave out every step, which trains nothing any more."""
        self._left_out = self._left_out + 1 if left_out else 0
        if self._left_out >= max(_HOPELESS, self.sharding.steps_per_epoch):
            self._flush()
            raise RunFailed(
                f"--on-nan skip: the last {self._left_out} steps were all left out, as their gradients were not "
                "finite: look at the data and the learning rate."
            )

    def _keep_statistics(self, put_back: bool = False) -> None:
        """With `--on-nan skip`: keep BatchNorm's statistics, or put back those from before a step that is left out.

        What is not finite reaches them in the forward pass, and would stay.
        """
        if self.options.on_nan != "skip" or self._statistics == {}:
            return
        local = self.adapter.export_local(self.model)
        if put_back and self._statistics is not None:
            self.adapter.import_local(self.model, {**local, **self._statistics})
        else:
            self._statistics = {name: array for name, array in local.items() if name.startswith("model/")}

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
        not_finite = self._at.not_finite
        finite = self.sharding.steps_per_epoch - not_finite
        of_gpu = self._gpu_usage.end_epoch()
        loss = self._at.loss_sum / finite if finite else math.nan
        self._at = _Position(self.epoch + 1, self.step)
        seconds = time.perf_counter() - self._epoch_began
        self._epoch_began = time.perf_counter()
        row: dict[str, float] = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": loss,
            **metrics,
            "seconds": round(seconds, 4),
            **of_gpu,
            **({"not_finite": not_finite} if not_finite else {}),
        }
        self._write_rows("epoch", row)
        if self.finished or self.epoch % self.options.print_every == 0:
            shown = {"loss": loss, **metrics}
            text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
            less = f"; {not_finite} step(s) were not finite" if not_finite else ""
            self.progress.line(f"epoch {self.epoch}/{self.options.epochs}  {text}  {seconds:.2f} s{less}")
        due = self._saves_after(self.step) or self._save_is_due
        if self.finished or self.epoch % self.options.checkpoint_every == 0 or due:
            self.save()
        self._commit()
        if self._times is not None:
            self._times.begin()
        return row

    def save(self) -> None:
        """Save a checkpoint of this moment; all ranks call it, between steps, and hold the same model.

        Rank 0 takes a copy of the state, and writes it while training goes on. Where that fails, it says so
        and tries again, until a newer checkpoint takes the place of this one. After an epoch's last step it
        is saved by `end_epoch`.

        Raises:
            RuntimeError: called between the passes of a step.
            RanksDiffer: the ranks do not hold the same model.
        """
        if self._losses:
            raise RuntimeError("run.save() between the passes of a step: call it after the step's last pass.")
        self._save_is_due = self.steps_left_in_epoch == 0
        if self._save_is_due:
            return
        self._flush()
        if self.options.check_sync != 0 and not self._sync.has_compared(self.step):
            self.check_sync()
        # Before there is another copy of the state.
        output.decided_by_rank_0(self.world, self.adapter, self._writer.wait)
        local = self.adapter.gather(self.adapter.export_local(self.model, self.optimizer))
        counts = {"audit/counts": self._audit.counts()} if self._audit else {}
        if self.world.rank == 0:
            state = {**self._state(local), **counts}
            self._writer.write(self.directory, self.step, state, self._manifest(), self.options.keep)

    def _state(self, local: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """A checkpoint's arrays, with what each rank keeps for itself."""
        return {
            **self.adapter.export_state(self.model, self.optimizer),
            **_means(local),
            **{f"rank{r}/{name}": array for r, state in enumerate(local) for name, array in state.items()},
        }

    def _commit(self, interrupt: bool = True) -> None:
        """In an elastic job, hold a checkpoint of this moment in memory; let workers come and go here.

        Args:
            interrupt: false where they may not.

        Raises:
            HostsUpdatedInterrupt: there are other hosts than before; on every rank, with the commit made.
        """
        if self._membership is None:
            return
        self._flush()
        counts = {"audit/counts": self._audit.counts()} if self._audit else {}
        manifest = {**self._manifest(), "stopped": self._stopped}  # read from a commit only: a resumed run goes on
        # The last collective operation of a commit: who has its result knows that rank 0 has written the rows.
        local = self.adapter.export_local(self.model, self.optimizer)
        told = self.adapter.gather((local, manifest["extra"], self._membership.hosts_changed.is_set()))
        manifest["extra"] = told[0][1]
        state = {**self._state([local for local, _, _ in told]), **counts}
        self._membership.keep(checkpoint.Checkpoint(self.directory, manifest, state))
        if interrupt and not self.finished and any(changed for _, _, changed in told):
            raise elastic.hosts_updated()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watch.leaving(error)
        self._end_cuts()
        self.progress.close()
        try:
            try:
                if kind is None and self._times is not None:
                    self._times.write(self.name, self.world, self.adapter, self.model)
                if kind is None and self.finished:
                    output.decided_by_rank_0(self.world, self.adapter, lambda: self._writer.finish(tries=0))
            finally:
                if self.world.rank == 0:
                    self._leave_directory(whole=kind is None)
            if self._membership is not None and kind is None:
                self.adapter.gather(None)  # whoever leaves before rank 0 has written could not write in its place
        finally:
            self._agreement.end()

    def _leave_directory(self, whole: bool) -> None:
        """Write what is left to write, and give the directory up.

        Args:
            whole: the run has come to its end; otherwise, what can't be written at once is left.

        Raises:
            RunFailed: the last checkpoint could not be written.
        """
        try:
            if whole:
                self._finish_writing()
                newest = self._newest()
                self.progress.line(f"checkpoint: {newest}" if newest else "no checkpoint was written")
        finally:
            if self._metrics is not None:
                self._metrics.close()
            # An exception is told when this block is left; in elastic mode another attempt follows in this process.
            if self._writer.close(None if whole or self._membership else _LAST_WRITE):
                self._release_claim()  # else the process's end does

    def _finish_writing(self) -> None:
        failure = self._writer.finish()
        if failure is not None:
            raise RunFailed(
                f"the last checkpoint could not be written to {self.directory}: {failure}; "
                f"the last good one is {self._newest() or 'none'}: --resume goes on from there."
            )

    def _newest(self) -> Path | None:
        try:
            return max(checkpoint.steps(self.directory), default=None)
        except OSError:
            return None

    def _check_claim(self) -> None:
        if self._claim is not None:
            self._claim.check()

    def _release_claim(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def _saves_after(self, step: int) -> bool:
        every = self.options.checkpoint_steps
        return every is not None and step % every == 0

    def _flush(self) -> None:
        """Average the noted losses over the ranks; rank 0 writes the rows."""
        if not self._rows:
            return
        self._gpu_usage.note()
        local = np.array([row["loss"][0] if len(row["loss"]) == 1 else np.mean(row["loss"]) for row in self._rows])
        losses = np.asarray(self.adapter.average({"loss": local})["loss"]).tolist()
        for row, loss in zip(self._rows, losses, strict=True):
            finite = math.isfinite(loss) and "skipped" not in row
            self._at.loss_sum += loss if finite else 0.0
            self._at.not_finite += not finite
            row["loss"] = loss
        self._write_rows("step", *self._rows)
        self._rows = []

    def _write_rows(self, kind: str, *rows: dict[str, Any]) -> None:
        if self._metrics is not None:
            # JSON has no NaN.
            finite = [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
                for row in rows
            ]
            self._metrics.write(kind, *finite)

    def _is_stopped_anew(self) -> bool:
        """Whether the ranks know by now, and did not before, that the run is to stop before it is complete."""
        word = self._agreement.stopping
        if word is None or self.finished:
            return False
        self._stopped = True
        if not word.asked:
            self.progress.line(f"stopped early by {word.name} after step {self.step}")
        return True

    def _leave_if_told(self) -> None:
        """After a signal, once the checkpoint is on its way: leave the job, and say how to go on."""
        word = self._agreement.stopping
        if word is None or not word.asked or (not self._stopped and not self.options.fold):
            return  # where the run is complete only other folds would follow
        output.decided_by_rank_0(self.world, self.adapter, self._finish_writing)  # no rank leaves while rank 0 writes
        self.progress.line(
            f"stopped by {signal.Signals(word.asked).name} on {word.name} after step {self.step}; to go on: "
            f"{resume_command(self.directory.parent if self.options.fold else self.directory, self.world.size)}"
        )
        self.adapter.stop()
        ending.note(128 + word.asked)
        raise SystemExit(128 + word.asked)

    def _agree_on_directory(self) -> tuple[Path, checkpoint.Checkpoint | None]:
        """Rank 0 finds the output directory and what to resume; every rank gets its answer, and its own state."""
        saved: dict[str, np.ndarray] = {}  # on the rank that has it
        holder = self._membership.enter() if self._membership else None

        def decide() -> tuple[Path, tuple[Path, dict[str, Any], list[str]] | None]:
            resume = self.options.resume
            directory = holder.directory if holder else output.choose(self.name, self.options.output, resume)
            limit = self.options.stall_timeout
            patience = min(PATIENCE, limit / 2 if limit else PATIENCE) if holder else 0  # the others wait for this rank
            self._claim = output.claim(directory, resume or holder is not None, patience)
            if holder is not None and holder.step >= 0:
                return directory, None
            try:
                found = output.to_resume(directory) if resume else None
                if found is None:
                    return directory, None
                self._keep_global_batch(found.manifest)
                self._check_same_run(found)
            except BaseException:
                self._release_claim()
                raise
            saved.update(found.state)
            return directory, (found.path, found.manifest, list(found.state))

        source = 0
        directory, told = output.decided_by_rank_0(self.world, self.adapter, decide)
        if holder is not None and holder.step >= 0:
            source = holder.rank
            commit = self._membership.commit if self.world.rank == source and self._membership else None
            saved.update(commit.state if commit else {})
            told = self.adapter.gather(commit and (directory, commit.manifest, list(saved)))[source]
            self._stopped = told[1]["stopped"]
            self._keep_global_batch(told[1])
            different = self._difference(told[1])
            if different:  # the others lose this worker, and go on
                raise RunFailed(
                    f"the run in {directory} has {different}: start the workers of all hosts with the same script, "
                    "data and options."
                )
        if self._membership is not None:
            self._membership.directory = directory
        if told is None:
            return directory, None
        path, manifest, names = told
        self._keep_global_batch(manifest)
        state = {}
        for name in names:  # one by one: MPI sends 2 GiB at most at once
            array = self.adapter.gather(saved.get(name))[source]
            if not name.startswith("rank") or name.startswith(f"rank{self.world.rank}/"):
                state[name] = array
        return directory, checkpoint.Checkpoint(path, manifest, state)

    def _keep_global_batch(self, manifest: Mapping[str, Any]) -> None:
        """In an elastic job, go on with the global batch of the run's start where --batch-size is a worker's."""
        batch = manifest.get("global_batch_size", 0)
        if self._membership is not None and self.options.batch_size and 0 < batch <= self.sharding.samples:
            self.sharding = replace(self.sharding, global_batch_size=batch)

    def _take_up(self, found: checkpoint.Checkpoint | None) -> None:
        """Begin with rank 0's state, or with a checkpoint's."""
        adapter, world, seed, local = self.adapter, self.world, self.options.seed, None
        if found is not None:
            shared = {name: a for name, a in found.state.items() if name.startswith(("model/", "optimizer/"))}
            with _one_line(found.path, "the model's and optimizer's state"):
                adapter.import_state(self.model, self.optimizer, shared)
            self._at = _Position(**found.manifest["position"])
            self._reference = found.manifest["reference_batch_size"]
            for name, saved in found.manifest["extra"].items():
                with _one_line(found.path, f"the state of {name}"):
                    self._extra[name].load_state_dict(plain.decode(saved))
            prefix = f"rank{world.rank}/"
            if found.manifest["world_size"] == world.size:
                local = {n.removeprefix(prefix): a for n, a in found.state.items() if n.startswith(prefix)}
                if "reducer" in found.manifest and hasattr(self.optimizer, "reducer"):
                    self.optimizer.reducer = found.manifest["reducer"]  # the other may add up in another order
            if self._audit and "audit/counts" in found.state:
                self._audit.restore(found.state["audit/counts"])
        else:
            adapter.broadcast_state(self.model, self.optimizer)
        # Other workers than before, and generators of other devices, draw other numbers than before.
        mixed = np.random.SeedSequence([seed, self.step]).generate_state(1)[0] if self.step else seed
        adapter.seed_local(self.model, int(mixed), world.rank)
        if found is not None and local is not None:
            with _one_line(found.path, f"what rank {world.rank} keeps for itself"):
                adapter.import_local(self.model, local, self.optimizer)

    def _check_same_run(self, found: checkpoint.Checkpoint) -> None:
        """Refuse to continue a run whose position would mean other samples here, or what no run has saved."""
        manifest, different = found.manifest, self._difference(found.manifest)
        if different:
            raise UsageError(
                f"--resume: {found.path} was made with {different}: "
                "give the options that it was made with, or choose another --output."
            )
        strange = self._strange(found)
        if strange:
            raise UsageError(f"--resume: {found.path} was not saved by this run, as {strange}: remove it.")
        if self._audit and manifest["position"]["step_in_epoch"] and "audit/counts" not in found.state:
            raise UsageError(
                f"--audit: {found.path} lies within an epoch whose samples were not counted: resume without --audit."
            )

    def _difference(self, manifest: Mapping[str, Any]) -> str | None:
        """What a run that has saved this has otherwise than this one; None: nothing."""
        here = self.adapter.describe(self.model)
        told = {key: here.get(key) for key in ("framework", "backend")}
        for key, value in {**told, **self._identity()}.items():
            if manifest.get(key) != value:
                return f"{key} {checkpoint.shown(manifest.get(key))}, this run has {key} {value}"
        return None

    def _strange(self, found: checkpoint.Checkpoint) -> str | None:
        """What in a checkpoint, whose values are of the right types, can't be of this run; None: nothing."""
        lacking = {"position", "world_size", "reference_batch_size", "extra"} - found.manifest.keys()
        if lacking:
            return f"it lacks {min(lacking)}"
        at, per_epoch = _Position(**found.manifest["position"]), self.sharding.steps_per_epoch
        if at.step_in_epoch >= per_epoch or at.step != at.epoch * per_epoch + at.step_in_epoch:
            return f"its step is {at.step}, in epoch {at.epoch} after {at.step_in_epoch} of {per_epoch} steps"
        if found.manifest["reference_batch_size"] > self.sharding.samples:
            return f"its reference batch size is {found.manifest['reference_batch_size']}"
        if found.manifest["extra"].keys() != self._extra.keys():
            return "it keeps other objects in extra"
        of_ranks: dict[str, set[tuple]] = {}
        for name, array in found.state.items():
            if name.startswith("rank"):
                rank, _, rest = name.partition("/")
                of_ranks.setdefault(rank, set()).add((rest, array.dtype, array.shape))
        size = found.manifest["world_size"]
        if len(of_ranks) != size or any(of_ranks.get(f"rank{r}") != of_ranks["rank0"] for r in range(size)):
            return f"the states that its {size} ranks have of their own are not alike"
        counts = found.state.get("audit/counts", np.zeros(self.sharding.samples, np.int64))
        if counts.dtype != np.int64 or counts.shape != (self.sharding.samples,) or counts.min() < 0 or counts.max() > 1:
            return "its audit/counts are no counts of samples"
        return None

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
            "compression": self._compression,
        }

    def _manifest(self) -> dict[str, Any]:
        """Everything that an exact resume needs beside the arrays."""
        reducer = getattr(self.optimizer, "reducer", None)
        return {
            **self._origin,
            **self._identity(),
            "world_size": self.world.size,
            "position": asdict(self._at),
            "reference_batch_size": self._reference,
            **({"reducer": reducer} if reducer else {}),
            "learning_rate_of_next_step": self.learning_rate(),
            "extra": {name: plain.encode(name, thing.state_dict()) for name, thing in self._extra.items()},
        }


@contextlib.contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    """Say in one line that a saved state was refused, by whatever took it: its values are of whoever wrote the file."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        text = checkpoint.shown(error or type(error).__name__)
        raise UsageError(
            f"--resume: {what} in {path} can't be taken up ({text}): remove this checkpoint, or build the model and "
            "its optimizer as when it was saved."
        ) from error


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

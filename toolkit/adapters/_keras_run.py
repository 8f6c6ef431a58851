"""A `Run` under Keras' `fit`: its batches as a `PyDataset`, and its log and epochs as a callback."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from toolkit import watch
from toolkit.errors import UsageError
from toolkit.reading import Cuts, Rows
from toolkit.run import Batch, Run
from toolkit.sharding import Part

if keras.backend.backend() == "torch":
    from toolkit.adapters._keras_torch_ops import export_random, import_random
else:

    def export_random() -> dict[str, np.ndarray]:
        """Nothing: only Keras on torch draws from a global generator of its own accord."""
        return {}

    def import_random(state: Mapping[str, np.ndarray]) -> None:
        """Nothing."""


class Batches(keras.utils.PyDataset):
    """This rank's parts of the global batches for `fit`, from where the run stands.

    Gives (x, y, sample_weight); the weights make the averaged gradients the exact mean over each
    global batch, under Keras' default reduction of losses to the mean. Pass `shuffle=False` to `fit`.

    Args:
        run: the entered run.
        data: numpy arrays `data.x` and `data.y` of one row a sample, as `Run.batches` takes them; or a map-style
            dataset, where `data[index]` for an int index gives one sample's (x, y), numbers, arrays or CPU tensors, or
            nests (tuples, lists, dicts) of them, which are stacked. Anything that has `[]` is taken as map-style.
        prepare: from a batch to the model's input, such as adding a channel axis or augmentation;
            `Batch.generators` gives random numbers that do not depend on the rank, which numbers drawn
            within `data[index]` do.
        options: `keras.utils.PyDataset`'s: workers, use_multiprocessing, max_queue_size. Processes are
            forked beside TensorFlow's, Horovod's and MPI's threads: data and `prepare` must then call none
            of the three, but numpy. For workers on torch see `torch_data`.

    Raises:
        UsageError: the data is neither, or has another length than the run, or Keras on torch is asked for
            workers; from `fit`, where it shuffles the batches.
    """

    def __init__(
        self, run: Run, data: Any, prepare: Callable[[Batch], Any] = lambda batch: batch.x, **options: Any
    ) -> None:
        super().__init__(**options)
        if keras.backend.backend() == "torch" and (self.workers > 1 or self.use_multiprocessing):
            # It tries out the model on a first batch, and hands what it has read by then to the epoch before batch 0.
            raise UsageError(
                f"Batches was given workers={self.workers}, and Keras on torch trains on other batches than asked for "
                "with workers: leave them out, or use torch_data(run, dataset, num_workers=…)."
            )
        self._run, self._data, self._prepare = run, data, prepare
        self._map_style = _check_data(run, data)
        self._rows = None if self._map_style else (Rows(data.x), Rows(data.y))
        self._cuts: Cuts | None = None
        self._next = 0  # of the parts, in what is cut
        self._taken = run.epoch, list(run.parts_left_in_epoch())
        self._asked = itertools.count()

    def __len__(self) -> int:
        self.on_epoch_begin()  # Keras asks for the length before it starts an epoch's threads, and calls that after
        return len(self._taken[1])

    def __getitem__(self, index: int) -> tuple[Any, Any, np.ndarray]:
        # In order, but for what the other workers have taken up; processes have each a count of their own.
        if index >= next(self._asked) + max(1, self.workers) and not self.use_multiprocessing:
            raise UsageError("fit() shuffles the batches, which are in their order already: pass shuffle=False.")
        epoch, parts = self._taken
        part = parts[index]
        x, y = self._read(parts, index)
        batch = Batch(x, y, part.weight, part.indices, epoch, self._run.options.seed)
        return self._prepare(batch), y, np.full(len(part.indices), part.weight, np.float32)

    def on_epoch_begin(self) -> None:
        """Take up the epoch that the run is in."""
        if self._taken[0] != self._run.epoch:
            # One assignment, as other threads read it.
            self._taken = self._run.epoch, list(self._run.parts_left_in_epoch())

    def on_epoch_end(self) -> None:
        """Count anew; Keras has ended the epoch's threads by now, and tried out first batches before the first."""
        self._asked = itertools.count()

    def _read(self, parts: list[Part], index: int) -> tuple[Any, Any]:
        if self._rows is None:
            samples = [self._data[sample] for sample in parts[index].indices.tolist()]
            x, y = zip(*((x, y) for x, y in samples), strict=True)
            return _stacked(x), _stacked(y)
        if keras.backend.backend() == "tensorflow":  # where tf.data reads ahead
            of_x, of_y = self._rows
            return of_x.cut(parts[index].indices), of_y.cut(parts[index].indices)
        if self._cuts is None or index != self._next:  # Keras tries out the first batches before an epoch
            self._cuts = self._run.cuts(self._data, parts[index:])
        self._next = index + 1
        _, x, y = next(self._cuts)
        return x, y


def _check_data(run: Run, data: Any) -> bool:
    """Whether `data` is map-style; raise `UsageError` where it fits neither way of reading it, or not the run."""
    kind = type(data).__name__
    map_style = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if not map_style and not (hasattr(data, "x") and hasattr(data, "y")):
        raise UsageError(f"the data is a {kind}: give arrays x and y, or a dataset with len(data) and data[index].")
    samples = len(data) if map_style else len(data.x)
    if samples != run.sharding.samples:
        raise UsageError(
            f"the data {kind} has {samples} samples and the run {run.sharding.samples}: give Run(…) its length."
        )
    return map_style


def _stacked(samples: tuple[Any, ...]) -> Any:
    """A batch of samples, each a leaf or the same nest of leaves."""
    return keras.tree.map_structure(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *samples)


class RunCallback(keras.callbacks.Callback):
    """Sets the learning rate before each batch, and logs the step's loss and the epoch's metrics.

    Put it after `MetricAverage`, whose averages it logs. The `loss` of the epoch's logs becomes
    the mean over the epoch's global batches. Metrics that Keras keeps over the training batches of an
    epoch, such as `accuracy`, count from where a run was resumed; those of validation are whole. Put it last: an
    early stop (`model.stop_training`) by a callback before it, on one rank or more, ends the run on all of them; one
    by a callback after it must be the same on all ranks. `--audit` counts the samples that the run had this
    rank take, in the order of `fit`'s batches.

    Args:
        run: the entered run.
        metrics: names in the epoch's row to names in Keras' logs, such as {"test_accuracy": "val_accuracy"}.

    Raises:
        UsageError: from `fit`, where the model is compiled with `steps_per_execution` above 1, or where it
            would take another number of batches than the run has left in the epoch.
    """

    def __init__(self, run: Run, metrics: Mapping[str, str]) -> None:
        super().__init__()
        self._run, self._metrics = run, metrics
        # Torch's generator between an epoch's last batch and the next one's first: what Keras draws there, for its
        # data loaders and for trying out the model in a new process, a resumed run draws at other times.
        self._random: dict[str, np.ndarray] | None = export_random()
        self._weights: list[np.ndarray] = []

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Refuse what would hide steps from the run."""
        if self.model.steps_per_execution != 1:
            raise UsageError(
                f"the model is compiled with steps_per_execution={self.model.steps_per_execution}: "
                "the run counts and logs every step, so leave it at 1."
            )
        self._run.agree_to_stop()
        self.model.stop_training = self._run.finished

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Take up the epoch that the run is in."""
        left = self._run.steps_left_in_epoch * self._run.sharding.accumulation_steps
        batches = self.params.get("steps")
        if batches not in (None, left):  # such as after a resume in mid-epoch: fit() counts the data once
            raise UsageError(
                f"fit() would take {batches} batches in an epoch that has {left} left: build its data in the call "
                "of fit(), with epochs=run.whole_epochs_until, and call it until run.finished."
            )
        self._parts = self._run.parts_left_in_epoch()

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Set the learning rate, and have Keras' running mean of the loss begin with this batch."""
        if self._random is not None:
            import_random(self._random)
            self._random = None
        watch.doing(f"training at step {self._run.step + 1}, or loading its batch")
        self.model.optimizer.learning_rate = self._run.learning_rate()
        for metric in self.model.metrics:
            if metric.name == "loss":
                metric.reset_state()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Log the batch's loss; end `fit` where the run is to end."""
        self._run.log(loss=(logs or {})["loss"], part=next(self._parts))
        if self._run.finished or self._run.steps_left_in_epoch == 0:
            self._random = export_random()
        self._take_over_stop()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """End the run's epoch with the metrics asked for."""
        logs = {} if logs is None else logs
        if self._random is not None:
            import_random(self._random)
        row = self._run.end_epoch(**{name: float(logs[logged]) for name, logged in self._metrics.items()})
        if row:
            logs["loss"] = row["train_loss"]
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if getattr(optimizer, "use_ema", False):
            self._weights = self._copies()
        self._take_over_stop()
        self._run.agree_to_stop()
        self.model.stop_training = self._run.finished

    def on_train_end(self, logs: dict | None = None) -> None:
        """Take an early stop over for the run; where training goes on, undo what `fit` does to weights at its end."""
        if self._run.finished:
            return
        averaged = self._copies() if self._weights else []
        self._assign(self._weights)  # with EMA, fit() has just overwritten the weights with their averages
        if self.model.stop_training:  # by a callback after this one
            self._run.stop()
            self._run.agree_to_stop()
            self._assign(averaged)

    def _take_over_stop(self) -> None:
        """Make what a callback of this rank decided a wish, which all ranks follow together."""
        if self.model.stop_training and not self._run.finished:
            self._run.stop()
        self.model.stop_training = self._run.finished

    def _copies(self) -> list[np.ndarray]:
        return [np.array(keras.ops.convert_to_numpy(v)) for v in self.model.trainable_variables]

    def _assign(self, weights: list[np.ndarray]) -> None:
        for variable, array in zip(self.model.trainable_variables, weights, strict=False):
            variable.assign(array)

"""A `Run` under Keras' `fit`: its batches as a `PyDataset`, and its log and epochs as a callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from toolkit.run import Run


class Batches(keras.utils.PyDataset):
    """This rank's parts of the global batches for `fit`, from where the run stands.

    Gives (x, y, sample_weight); the weights make the averaged gradients the exact mean over each
    global batch, under Keras' default reduction of losses to the mean. Pass `shuffle=False` to `fit`.

    Args:
        run: the entered run.
        data: holds numpy arrays `x` and `y` of one row a sample.
        prepare: from x of a batch to the model's input, such as adding a channel axis.
    """

    def __init__(self, run: Run, data: Any, prepare: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> None:
        super().__init__()
        self._run, self._data, self._prepare = run, data, prepare
        self._parts = list(run.parts_left_in_epoch())

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = self._parts[index]
        x, y = self._data.x[part.indices], self._data.y[part.indices]
        return self._prepare(x), y, np.full(len(y), part.weight, np.float32)

    def on_epoch_begin(self) -> None:
        """Take up the epoch that the run is in."""
        self._parts = list(self._run.parts_left_in_epoch())


class RunCallback(keras.callbacks.Callback):
    """Sets the learning rate before each batch, and logs the step's loss and the epoch's metrics.

    Put it after `MetricAverage`, whose averages it logs. The `loss` of the epoch's logs becomes
    the mean over the epoch's global batches.

    Args:
        run: the entered run.
        metrics: names in the epoch's row to names in Keras' logs, such as {"test_accuracy": "val_accuracy"}.
    """

    def __init__(self, run: Run, metrics: Mapping[str, str]) -> None:
        super().__init__()
        self._run, self._metrics = run, metrics

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Set the learning rate, and have Keras' running mean of the loss begin with this batch."""
        self.model.optimizer.learning_rate = self._run.learning_rate()
        for metric in self.model.metrics:
            if metric.name == "loss":
                metric.reset_state()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Log the batch's loss; end `fit` where the run is to end."""
        self._run.log(loss=(logs or {})["loss"])
        if self._run.finished:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """End the run's epoch with the metrics asked for."""
        logs = {} if logs is None else logs
        row = self._run.end_epoch(**{name: float(logs[logged]) for name, logged in self._metrics.items()})
        if row:
            logs["loss"] = row["train_loss"]

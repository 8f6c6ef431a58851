"""The same model as `training_tensorflow`'s under Keras' `fit`, on either backend, for `tests.gpu.overhead`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tests.gpu.models_keras import model_and_samples

if keras.backend.backend() == "torch":
    from tests.gpu.training_torch import allocated, peak, restart_peak, wait
else:
    from tests.gpu.training_tensorflow import allocated, peak, restart_peak, wait

__all__ = ["Training", "allocated", "peak", "restart_peak", "wait"]


class Training:
    """With AdamW, on the same data in each step; by Keras alone, or by the toolkit's adapter where one is given."""

    def __init__(self, place: str, dp: Any = None) -> None:
        self._model, samples = model_and_samples(place)
        optimizer: Any = keras.optimizers.AdamW(1e-4)
        if dp:
            optimizer = dp.distribute(optimizer, self._model)
        # Both without XLA, which Keras takes on a GPU by itself, and which can't hold Horovod.
        self._model.compile(optimizer, loss="mse", jit_compile=False)
        x = keras.random.normal((samples, self._model.input_shape[1]), seed=0)
        self._batch = x, keras.ops.zeros_like(x)
        flag = (lambda *_, **__: dp.exchange_flag(False)) if dp else (lambda *_, **__: None)  # as `Run` does
        self._callbacks = [keras.callbacks.LambdaCallback(on_train_batch_begin=flag)]

    def take(self, steps: int) -> None:
        """Some steps, in one call of `fit`."""
        self._model.fit(Same(self._batch, steps), shuffle=False, verbose=0, callbacks=self._callbacks)

    def weights(self) -> list[np.ndarray]:
        """All that is trained."""
        return self._model.get_weights()


class Same(keras.utils.PyDataset):
    """One batch, as often as is asked for."""

    def __init__(self, batch: Any, steps: int) -> None:
        super().__init__()
        self._batch, self._steps = batch, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Any:
        return self._batch

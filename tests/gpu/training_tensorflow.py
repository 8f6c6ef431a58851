"""The feed-forward parts of a transformer, trained by a loop of TensorFlow's, for `tests.gpu.overhead`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tests.gpu.models_keras import model_and_samples


class Training:
    """With AdamW, on the same data in each step; by TensorFlow alone, or the toolkit's adapter where one is given."""

    def __init__(self, place: str, dp: Any = None) -> None:
        model, samples = model_and_samples(place)
        optimizer: Any = keras.optimizers.AdamW(1e-4)
        self._x = tf.random.stateless_normal((samples, model.input_shape[1]), (0, 0))
        self._model, self._dp = model, dp
        if dp:
            optimizer = dp.distribute(optimizer, model)

        @tf.function
        def step(x: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True)))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        self._step = step

    def take(self, steps: int) -> None:
        """Some steps, as a script has them."""
        for _ in range(steps):
            if self._dp:
                self._dp.exchange_flag(False)  # as `Run` does
            self._step(self._x)

    def weights(self) -> list[np.ndarray]:
        """All that is trained."""
        return self._model.get_weights()


def wait() -> None:
    """Until the device has done all that it was given."""
    tf.test.experimental.sync_devices()


def allocated() -> int:
    """The bytes of the GPU that tensors have."""
    return tf.config.experimental.get_memory_info("GPU:0")["current"]


def restart_peak() -> None:
    """Have `peak` begin anew."""
    tf.config.experimental.reset_memory_stats("GPU:0")


def peak() -> int:
    """The most that `allocated` was."""
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]

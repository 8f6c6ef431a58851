"""The feed-forward parts of a transformer, on either of Keras' backends, for `tests.gpu.overhead`."""

from __future__ import annotations

import keras

SIZES = {  # layers, width, samples
    "gpu": (12, 1024, 8192),
    "cpu": (4, 128, 256),
}


def model_and_samples(place: str) -> tuple[keras.Model, int]:
    """The model, from the same weights each time, and how many samples a step has."""
    layers, width, samples = SIZES["cpu" if place == "cpu" else "gpu"]
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((width,))
    for _ in range(layers):
        inner = keras.layers.Dense(4 * width, "relu")(keras.layers.LayerNormalization()(x))
        x = keras.layers.Add()([x, keras.layers.Dense(width)(inner)])
    return keras.Model(inputs, x), samples

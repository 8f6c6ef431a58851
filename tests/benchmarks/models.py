"""The models that contestants train, as numbers: shapes, initial weights, batches. Loads no framework.

Convolutions are (out, in, height, width) and dense layers (out, in), as torch has them; `for_keras` turns them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

BATCH = 64  # samples a rank and step
RATE = 0.01  # of plain SGD
DIFFERENT_BATCHES = 8  # a rank's, taken in turn
SCALE, SHIFT = "scale", "shift"  # of a BatchNorm; its parameters begin as ones and zeros
EPSILON = 1e-3  # BatchNorm's


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        title: for tables.
        inputs: the shape of a sample, channels first.
        outputs: classes, or 1 for a regression.
        layers: the shape of each layer's weight by the layer's name, in order; one dimension: a BatchNorm.
        warm_steps: steps before any is timed, after which the weights of contestants are compared.
    """

    title: str
    inputs: tuple[int, ...]
    outputs: int
    layers: Mapping[str, tuple[int, ...]]
    warm_steps: int = 20

    @property
    def parameters(self) -> int:
        """Trained numbers, biases included; a BatchNorm has two for each channel."""
        return sum(math.prod(shape) + shape[0] for shape in self.layers.values())


def _resnet() -> dict[str, tuple[int, ...]]:
    """Three stages of two residual blocks each, of 8, 16 and 32 channels; stages after the first halve the image."""
    layers: dict[str, tuple[int, ...]] = {"stem": (8, 3, 3, 3), "stem_norm": (8,)}
    before = 8
    for stage, channels in enumerate((8, 16, 32)):
        for block in range(2):
            name = f"stage{stage}_block{block}"
            layers |= {f"{name}_conv1": (channels, before, 3, 3), f"{name}_norm1": (channels,)}
            layers |= {f"{name}_conv2": (channels, channels, 3, 3), f"{name}_norm2": (channels,)}
            if before != channels:
                layers |= {f"{name}_skip": (channels, before, 1, 1), f"{name}_norm3": (channels,)}
            before = channels
    return {**layers, "top": (10, 32)}


MODELS = {
    "linear": Model("linear regression", (10,), 1, {"dense1": (1, 10)}),
    "cnn": Model(
        "CNN",
        (1, 28, 28),
        10,
        {"conv1": (10, 1, 5, 5), "conv2": (20, 10, 5, 5), "dense1": (50, 320), "dense2": (10, 50)},
    ),
    "mlp": Model(
        "MLP 1000-500-100-10", (1000,), 10, {"dense1": (500, 1000), "dense2": (100, 500), "dense3": (10, 100)}
    ),
    "mlp25m": Model(
        "MLP 1024-4096-4096-1000",
        (1024,),
        1000,
        {"dense1": (4096, 1024), "dense2": (4096, 4096), "dense3": (1000, 4096)},
        warm_steps=5,
    ),
    "resnet": Model("ResNet-like with BatchNorm", (3, 32, 32), 10, _resnet()),
}


def weights(model: Model) -> Iterator[tuple[str, str, np.ndarray]]:
    """Layer, `weight` or `bias`, and its initial values, one after the other, the same in every process.

    Drawn as torch does by default, from U(−1/√fan_in, 1/√fan_in).
    """
    generator = np.random.default_rng(0)
    for layer, shape in model.layers.items():
        if len(shape) == 1:
            yield layer, "weight", np.ones(shape, np.float32)
            yield layer, "bias", np.zeros(shape, np.float32)
            continue
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        yield layer, "weight", generator.uniform(-bound, bound, shape).astype(np.float32)
        yield layer, "bias", generator.uniform(-bound, bound, shape[0]).astype(np.float32)


def for_keras(model: Model, layer: str, array: np.ndarray) -> np.ndarray:
    """A weight or bias as a Keras layer with channels last has it."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if array.ndim == 1:
        return array
    names = list(model.layers)
    before = model.layers[names[max(0, names.index(layer) - 1)]]
    channels = before[0] if len(before) == 4 else 1  # torch flattens channel by channel, Keras pixel by pixel
    return array.reshape(len(array), channels, -1).swapaxes(1, 2).reshape(array.shape).T


def batches(model: Model, rank: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A rank's batches: float32 inputs, channels first, and int64 classes or float32 targets of shape (BATCH, 1)."""
    generator = np.random.default_rng([1, rank])
    found = []
    for _ in range(DIFFERENT_BATCHES):
        x = generator.normal(size=(BATCH, *model.inputs)).astype(np.float32)
        y = generator.normal(size=(BATCH, 1)).astype(np.float32)
        found.append((x, y if model.outputs == 1 else generator.integers(0, model.outputs, BATCH)))
    return found


def channels_last(x: np.ndarray) -> np.ndarray:
    """Images as TensorFlow and Keras take them; other inputs as they are."""
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim == 4 else x

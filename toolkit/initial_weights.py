"""The recipes' initial weights: drawn once with numpy, the same numbers in every framework.

A set of weights is a dict of writable float32 arrays, in the order of the layers and in torch's names and
layout: convolutions are (out, in, height, width), dense layers (out, in). It is a torch model's
`state_dict` as numpy arrays; `for_keras` lays it out for Keras.
"""

from __future__ import annotations

import math

import numpy as np


def cnn(seed: int) -> dict[str, np.ndarray]:
    """Weights of the digits' network: two 5x5 convolutions without padding, two dense layers.

    Args:
        seed: at least 0; the same seed gives the same weights.

    Returns:
        Weight and bias of `conv1` (1 → 10 channels), `conv2` (10 → 20), `fc1` (320 → 50), `fc2` (50 → 10),
        named `conv1.weight`, `conv1.bias` and so on.
    """
    shapes = {"conv1": (10, 1, 5, 5), "conv2": (20, 10, 5, 5), "fc1": (50, 320), "fc2": (10, 50)}
    generator = np.random.default_rng(seed)
    weights = {}
    for layer, shape in shapes.items():
        weights[f"{layer}.weight"], weights[f"{layer}.bias"] = _draw(generator, shape)
    return weights


def linear(features: int, seed: int) -> dict[str, np.ndarray]:
    """Weights of a linear regression with one output.

    Args:
        features: number of inputs, at least 1.
        seed: at least 0; the same seed gives the same weights.

    Returns:
        `weight` of shape (1, features) and `bias` of shape (1,).
    """
    weight, bias = _draw(np.random.default_rng(seed), (1, features))
    return {"weight": weight, "bias": bias}


def for_keras(weights: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The same weights as `model.set_weights` of a Keras model with channels last takes them.

    Args:
        weights: weight and bias of each layer, as this module's other functions return them; the first
            dense layer after a convolution takes the flattened images.

    Returns:
        float32 arrays in the order of the layers; convolutions are (height, width, in, out), dense layers
        (in, out).
    """
    arrays = []
    channels = 1
    for array in weights.values():
        if array.ndim == 4:
            channels = len(array)
            array = array.transpose(2, 3, 1, 0)
        elif array.ndim == 2:
            # torch flattens channel by channel, Keras pixel by pixel.
            array = array.reshape(len(array), channels, -1).swapaxes(1, 2).reshape(array.shape).T
            channels = 1
        arrays.append(np.ascontiguousarray(array))
    return arrays


def _draw(generator: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias from U(−1/√fan_in, 1/√fan_in).

    This is torch's default (documentation of torch.nn.Linear and torch.nn.Conv2d): Kaiming's uniform
    bound √(6 / ((1 + a²) · fan_in)) with a = √5.
    """
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    weight = generator.uniform(-bound, bound, shape).astype(np.float32)
    return weight, generator.uniform(-bound, bound, shape[0]).astype(np.float32)

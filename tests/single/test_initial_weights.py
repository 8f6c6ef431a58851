import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from toolkit import initial_weights

# Each framework's own model, in its own process: torch and TensorFlow must not share one.
TORCH = """
import sys
import numpy as np, torch
from torch import nn
from toolkit import initial_weights

model = nn.Sequential()
model.add_module("conv1", nn.Conv2d(1, 10, 5))
model.add_module("pool1", nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
model.add_module("conv2", nn.Conv2d(10, 20, 5))
model.add_module("pool2", nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()))
model.add_module("fc1", nn.Linear(320, 50))
model.add_module("relu", nn.ReLU())
model.add_module("fc2", nn.Linear(50, 10))
model.load_state_dict({k: torch.from_numpy(v) for k, v in initial_weights.cnn(3).items()})
line = nn.Linear(7, 1)
line.load_state_dict({k: torch.from_numpy(v) for k, v in initial_weights.linear(7, 3).items()})
data = np.load(sys.argv[1])
with torch.no_grad():
    logits = model(torch.from_numpy(data["images"][:, None]))
    fitted = line(torch.from_numpy(data["rows"]))
np.savez(sys.argv[2], logits=logits.numpy(), fitted=fitted.numpy())
"""
KERAS = """
import sys
import keras, numpy as np
from keras import layers
from toolkit import initial_weights

model = keras.Sequential([
    keras.Input((28, 28, 1)),
    layers.Conv2D(10, 5, activation="relu"), layers.MaxPooling2D(),
    layers.Conv2D(20, 5, activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
    layers.Dense(50, activation="relu"), layers.Dense(10),
])
model.set_weights(initial_weights.for_keras(initial_weights.cnn(3)))
line = keras.Sequential([keras.Input((7,)), layers.Dense(1)])
line.set_weights(initial_weights.for_keras(initial_weights.linear(7, 3)))
data = np.load(sys.argv[1])
logits = model.predict(data["images"][..., None], verbose=0)
np.savez(sys.argv[2], logits=logits, fitted=line.predict(data["rows"], verbose=0))
"""


def convolved(x, weight, bias):
    """Convolution without padding, ReLU, 2x2 max-pooling; x is (n, channels, height, width)."""
    windows = sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    y = np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]
    n, channels, height, width = y.shape
    return np.maximum(y, 0).reshape(n, channels, height // 2, 2, width // 2, 2).max(axis=(3, 5))


def expected_logits(w, images):
    w = {name: array.astype(np.float64) for name, array in w.items()}
    x = convolved(images[:, None].astype(np.float64), w["conv1.weight"], w["conv1.bias"])
    x = convolved(x, w["conv2.weight"], w["conv2.bias"]).reshape(len(images), -1)
    x = np.maximum(x @ w["fc1.weight"].T + w["fc1.bias"], 0)
    return x @ w["fc2.weight"].T + w["fc2.bias"]


@pytest.mark.parametrize(
    ("needed", "backend", "script"),
    [
        (("torch",), "", TORCH),
        (("keras", "tensorflow"), "tensorflow", KERAS),
        (("keras", "torch"), "torch", KERAS),
    ],
    ids=["torch", "keras on tensorflow", "keras on torch"],
)
def test_every_framework_computes_what_numpy_does(tmp_path, needed, backend, script):
    for package in needed:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    generator = np.random.default_rng(0)
    images, rows = generator.random((5, 28, 28), np.float32), generator.random((5, 7), np.float32)
    np.savez(tmp_path / "in.npz", images=images, rows=rows)
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "in.npz", tmp_path / "out.npz"],
        env=os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=120,
    )
    found = np.load(tmp_path / "out.npz")
    logits = expected_logits(initial_weights.cnn(3), images)
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
    line = initial_weights.linear(7, 3)
    np.testing.assert_allclose(found["fitted"], rows @ line["weight"].T + line["bias"], atol=1e-6)


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (initial_weights.cnn(seed) for seed in (0, 0, 1))
    assert sum(array.size for array in first.values()) == 21_840
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        assert not np.any(array == other[name])
        assert array.dtype == np.float32 and array.flags.writeable


def test_weights_fill_their_bounds_evenly():
    weights = initial_weights.cnn(0) | initial_weights.linear(100_000, 0)
    fan_in = {"conv1": 25, "conv2": 250, "fc1": 320, "fc2": 50, "weight": 100_000, "bias": 100_000}
    for name, array in weights.items():
        scaled = array.astype(np.float64) * np.sqrt(fan_in[name.split(".")[0]])
        assert abs(scaled).max() <= 1 + 1e-6
        # A uniform distribution on [-1, 1]: mean 0, variance 1/3; within five standard errors.
        if array.size > 100:
            assert abs(scaled.mean()) < 5 / np.sqrt(3 * array.size)
            assert abs(scaled.var() - 1 / 3) < 5 * np.sqrt(4 / 45 / array.size)


def test_keras_layout_keeps_the_weights_it_was_given():
    weights = initial_weights.cnn(0)
    before = {name: array.copy() for name, array in weights.items()}
    shapes = [array.shape for array in initial_weights.for_keras(weights)]
    assert shapes == [(5, 5, 1, 10), (10,), (5, 5, 10, 20), (20,), (320, 50), (50,), (50, 10), (10,)]
    for name, array in weights.items():
        np.testing.assert_array_equal(array, before[name])

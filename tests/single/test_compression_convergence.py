"""Training with each scheme against training with none: a network in numpy on digits, with 4 ranks as threads."""

import functools

import numpy as np
import pytest

from tests.rank_threads import Ranks
from toolkit import compression, datasets
from toolkit.sharding import Sharding

SIZE, EPOCHS, RATE = 4, 10, 0.1
SHAPES = [(784, 32), (32,), (32, 10), (10,)]


def weights():
    generator = np.random.default_rng(0)
    drawn = [generator.normal(size=shape) * (2 / shape[0]) ** 0.5 * (len(shape) > 1) for shape in SHAPES]
    return np.concatenate([array.ravel() for array in drawn]).astype(np.float32)


def unpacked(flat):
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES])
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), SHAPES, strict=True)]


def forward(flat, x):
    w1, b1, w2, b2 = unpacked(flat)
    hidden = np.maximum(x @ w1 + b1, 0)
    scores = hidden @ w2 + b2
    scores -= scores.max(1, keepdims=True)
    return hidden, scores - np.log(np.exp(scores).sum(1, keepdims=True))


def gradient(flat, x, y):
    hidden, logarithms = forward(flat, x)
    error = np.exp(logarithms)
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    back = error @ unpacked(flat)[2].T * (hidden > 0)
    parts = (x.T @ back, back.sum(0), hidden.T @ error, error.sum(0))
    return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


def forget(compressor):
    """Take the error feedback away."""
    state = compressor.state()
    compressor.load_state({**state, "memory": np.zeros_like(state["memory"])})


@functools.cache
def trained(name, remember=True):
    """Loss on the training data and accuracy on the test data after training on `SIZE` ranks."""
    train, test = datasets.digits(None)
    x, y = train.x.reshape(len(train), -1), train.y
    sharding = Sharding(samples=len(train), global_batch_size=32, size=SIZE)

    def work(wire):
        flat = weights()
        compressor = compression.make(name, SHAPES)
        for epoch in range(EPOCHS):
            for part in sharding.parts(epoch, wire.rank):
                mean = gradient(flat, x[part.indices], y[part.indices]) * np.float32(part.weight)
                compressor.average(mean, wire)
                if not remember:
                    forget(compressor)
                flat -= RATE * mean
        return flat

    results = Ranks(SIZE).run(work)
    assert all(result.tobytes() == results[0].tobytes() for result in results)
    _, logarithms = forward(results[0], x)
    _, scores = forward(results[0], test.x.reshape(len(test), -1))
    return -logarithms[np.arange(len(y)), y].mean(), (scores.argmax(1) == test.y).mean()


@pytest.mark.parametrize("name", ["fp16", "bf16", "int8", "topk:0.01", "topk:0.001", "powersgd:4", "powersgd:1"])
def test_a_scheme_trains_as_none_does(name):
    """Measured: loss within 7 % and accuracy within 0.6 points, at a loss of 0.075 and an accuracy of 0.978."""
    loss, accuracy = trained("none")
    assert loss < 0.1 and accuracy > 0.95
    with_scheme, its_accuracy = trained(name)
    assert abs(with_scheme - loss) < 0.15 * loss
    assert its_accuracy > accuracy - 0.02


@pytest.mark.parametrize("name", ["topk:0.01", "topk:0.001", "powersgd:4", "powersgd:1"])
def test_without_error_feedback_it_does_not(name):
    """Measured: 2.2, 7.6, 1.5 and 5 times the loss of none. So what the test above asks can be missed."""
    assert trained(name, remember=False)[0] > 1.3 * trained("none")[0]


def loss_with_small_features(name, remember=True):
    """Of softmax regression by Adam, where three quarters of the features are 300 times smaller than the others.

    The rate of each weight is for its feature, so that without compression their size makes no difference.
    """
    train, _ = datasets.digits(None)
    generator = np.random.default_rng(0)
    scale = np.where(generator.permutation(64) < 48, 1 / 300, 1).astype(np.float32)
    x, y = train.x[:, 3:26:3, 3:26:3].reshape(len(train), -1) * scale, train.y
    shapes = [(64, 10), (10,)]
    rate = 0.01 / np.concatenate([np.repeat(scale, 10), np.ones(10)])

    def scores(flat, x):
        raw = x @ flat[:640].reshape(64, 10) + flat[640:]
        raw -= raw.max(1, keepdims=True)
        return raw - np.log(np.exp(raw).sum(1, keepdims=True))

    def work(wire):
        flat, first, second = np.zeros(650, np.float32), 0, 0
        compressor = compression.make(name, shapes)
        sharding = Sharding(samples=len(train), global_batch_size=64, size=SIZE)
        parts = [part for epoch in range(EPOCHS) for part in sharding.parts(epoch, wire.rank)]
        for step, part in enumerate(parts, 1):
            error = np.exp(scores(flat, x[part.indices])) - np.eye(10)[y[part.indices]]
            sums = np.concatenate([(x[part.indices].T @ error).ravel(), error.sum(0)])
            mean = (sums * part.weight / len(error)).astype(np.float32)
            compressor.average(mean, wire)
            if not remember:
                forget(compressor)
            first, second = 0.9 * first + 0.1 * mean, 0.999 * second + 0.001 * mean**2
            flat -= rate * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        return flat

    return -scores(Ranks(SIZE).run(work)[0], x)[np.arange(len(y)), y].mean()


def test_int8_needs_error_feedback_where_gradients_of_one_tensor_differ_in_size():
    """Measured: 0.25 with none, 0.37 with int8, 0.59 without its memory. In the network above it changes nothing."""
    none = loss_with_small_features("none")
    without = loss_with_small_features("int8", remember=False)
    assert loss_with_small_features("int8") - none < 0.5 * (without - none)
    assert without > 1.5 * none

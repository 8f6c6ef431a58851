"""Data, options and expectations of the input pipelines' cases; imports no framework."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from toolkit import checkpoint, output
from toolkit.errors import UsageError
from toolkit.options import RunOptions
from toolkit.sharding import Sharding

SAMPLES, FEATURES, NOISE, RATE = 22, 4, 0.3, 0.05
BASE = Path(sys.argv[1])
# The last of an epoch's six batches holds two samples, so that of three ranks one has none.
OPTIONS = RunOptions(epochs=3, global_batch_size=4, learning_rate=RATE, seed=5, audit=True)
_generator = np.random.default_rng(0)
X = _generator.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
Y = _generator.normal(size=(SAMPLES, 1)).astype(np.float32)
WEIGHTS = _generator.normal(size=(FEATURES, 1)).astype(np.float32)


class Arrays:
    x, y = X, Y


def losses_in_numpy(augmented):
    """The losses of a linear regression by SGD in one process; `augmented(indices, epoch)` gives its inputs."""
    weights, losses = WEIGHTS.astype(np.float64), []
    sharding = Sharding(SAMPLES, OPTIONS.global_batch_size, 1, OPTIONS.seed)
    for epoch in range(OPTIONS.epochs):
        for indices in sharding.global_batches(epoch):
            x = augmented(indices, epoch)
            errors = x @ weights - Y[indices]
            losses.append(np.mean(errors**2))
            weights -= RATE * 2 * x.T @ errors / len(indices)
    return losses


def rows(directory):
    kinds = [output.read_metrics(directory, kind) for kind in ("step", "epoch")]
    return [{k: v for k, v in row.items() if k != "seconds"} for kind in kinds for row in kind]


def losses(directory):
    return [row["loss"] for row in output.read_metrics(directory, "step")]


def check_losses(name, found, expected):
    assert len(found) == len(expected) == 18, (name, len(found))
    np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)


def check_resume(name, train, gather, steps, stop):
    """`train(options)`, stopped after `stop` steps and resumed, ends with the bits of an uninterrupted run."""
    options = replace(OPTIONS, epochs=2)
    straight, stopped = BASE / name / "straight", BASE / name / "stopped"
    train(replace(options, output=straight))
    train(replace(options, output=stopped, max_steps=stop))
    train(replace(options, output=stopped, resume=True))
    gather(None)  # rank 0 has written it
    expected, found = checkpoint.newest(straight), checkpoint.newest(stopped)
    assert found.manifest["step"] == expected.manifest["step"] == steps
    assert rows(stopped) == rows(straight), name
    assert found.state.keys() == expected.state.keys()
    for key, array in expected.state.items():
        assert found.state[key].tobytes() == array.tobytes(), (name, key)


def refused(make, *words):
    """`make()` raises a `UsageError` of one line that holds the words."""
    try:
        make()
    except UsageError as error:
        text = str(error)
        assert "\n" not in text and all(word in text for word in words), text
    else:
        raise AssertionError(f"accepted: {words}")

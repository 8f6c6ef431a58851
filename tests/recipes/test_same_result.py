"""The recipes compute the same with 1 to 4 workers, in every framework, and as numpy's closed form."""

import functools
import json
import re

import numpy as np
import pytest

from tests.launching import launch
from toolkit import checkpoint, datasets

FLAVOURS = {
    "torch": ("torch", {}),
    "tensorflow": ("tensorflow", {}),
    "keras on tensorflow": ("keras", {"KERAS_BACKEND": "tensorflow"}),
    "keras on torch": ("keras", {"KERAS_BACKEND": "torch"}),
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Run a recipe once for each set of arguments; gives its output directory."""

    @functools.cache
    def run(recipe, flavour, size, *arguments):
        framework, environment = FLAVOURS[flavour]
        output = tmp_path_factory.mktemp("run") / "output"
        result = launch(
            size,
            [f"recipes/{recipe}_{framework}.py", "--output", output, *arguments],
            launcher="none" if size == 1 else "mpirun",
            environment=environment,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return output

    return run


def rows(output, kind):
    return [row for row in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def losses(output):
    return np.array([row["loss"] for row in rows(output, "step")])


def weights(output):
    """Names without framework prefixes to arrays, in torch's layout, of the newest checkpoint."""
    state = checkpoint.newest(output).state
    return {name: array for name, array in state.items() if name.startswith("model/")}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_linear_regression_reaches_numpys_least_squares(train, flavour, size):
    data = datasets.diabetes()
    column = np.ones((len(data), 1))
    solution = np.linalg.lstsq(np.hstack([data.x, column]).astype(np.float64), data.y.astype(np.float64), rcond=None)[0]
    found = sorted(weights(train("linear_regression", flavour, size)).items(), key=lambda item: -item[1].size)
    found = np.concatenate([array.ravel() for _, array in found])
    assert np.abs(found - solution.ravel()).max() / np.abs(solution).max() < 1e-3


# 50 samples a step over 4 workers, and an epoch that ends with a batch of 37: parts are unequal.
# At this rate training does not amplify rounding; at 0.02 a max-pool that rounding decides the other way can grow to
# 3 % of the loss by step 50, between any two runs that do not add in the same order.
SMALL = ("--global-batch-size", "50", "--learning-rate", "0.01")
CNN = ("--max-steps", "50", *SMALL)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cnn_losses_do_not_depend_on_the_number_of_workers(train, flavour, size):
    one, many = losses(train("cnn", flavour, 1, *CNN)), losses(train("cnn", flavour, size, *CNN))
    assert len(one) == 50 and one[-1] < one[0] - 0.1  # it has learnt something
    np.testing.assert_allclose(many, one, rtol=1e-4)


@pytest.mark.parametrize("flavour", list(FLAVOURS)[1:])
def test_cnn_losses_do_not_depend_on_the_framework(train, flavour):
    np.testing.assert_allclose(
        losses(train("cnn", flavour, 1, *CNN)), losses(train("cnn", "torch", 1, *CNN)), rtol=1e-3
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_accumulated_passes_make_the_same_steps(train, flavour):
    short = ("--max-steps", "30", *SMALL)
    passes = losses(train("cnn", flavour, 2, *short, "--accumulation-steps", "3"))
    np.testing.assert_allclose(passes, losses(train("cnn", flavour, 1, *CNN))[:30], rtol=1e-4)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_resumed_run_is_the_uninterrupted_one(train, flavour):
    """To the bit, with the interruption within an epoch; 45 steps are one."""
    framework, environment = FLAVOURS[flavour]
    straight = train("cnn", flavour, 2, "--epochs", "3")
    resumed = train("cnn", flavour, 2, "--epochs", "3", "--max-steps", "60")
    result = launch(
        2,
        [f"recipes/cnn_{framework}.py", "--output", resumed, "--epochs", "3", "--resume"],
        environment=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumed at epoch 1, step 60" in result.stdout
    expected, found = checkpoint.newest(straight), checkpoint.newest(resumed)
    assert found.path.name == expected.path.name == "step-00000135"
    assert found.state.keys() == expected.state.keys()
    for name, array in expected.state.items():
        assert np.array_equal(found.state[name], array), name
    assert losses(resumed).tolist() == losses(straight).tolist()
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(straight, "epoch")]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in rows(resumed, "epoch")] == timeless


def test_recipes_of_one_example_have_the_same_flags_and_defaults():
    for recipe in ("cnn", "linear_regression"):
        helps = [
            launch(1, [f"recipes/{recipe}_{f}.py", "--help"], launcher="none").stdout
            for f in ("torch", "tensorflow", "keras")
        ]
        flags = [re.findall(r"--[a-z-]+.*(?:\n {20,}.*)*", text[text.index("options:") :]) for text in helps]
        assert flags[0] == flags[1] == flags[2] and len(flags[0]) > 15

"""BatchNorm over the samples of all ranks, on real ranks, against a closed form in numpy and against one worker."""

import functools
import re

import pytest

from tests.launching import WORKERS, launch, some_long

TORCH, KERAS = WORKERS / "batch_norm_torch.py", WORKERS / "batch_norm_keras.py"
CASES = re.findall(r"@case\ndef (\w+)", TORCH.read_text())
KERAS_CASES = re.findall(r"@case\ndef (\w+)", KERAS.read_text())


@functools.cache
def run(size, worker, *arguments, **environment):
    """What the worker printed, and what went wrong; launched once."""
    launcher = "none" if size == 1 else "mpirun"
    result = launch(size, [worker, *arguments], launcher=launcher, environment=environment, timeout=280)
    return result.stdout, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)])
def test_torch(size, case):
    printed, told = run(size, TORCH)
    assert f"passed {case}\n" in printed, told


@pytest.mark.long
def test_groups_normalise_by_themselves():
    cases = ["equals_the_closed_form", "training_is_that_of_one_worker"]
    printed, told = run(4, TORCH, *cases, HVDKIT_TEST_GROUPS="2")
    assert re.findall(r"passed (\w+)", printed) == cases, told


@pytest.mark.parametrize("case", KERAS_CASES)
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("backend", some_long(["tensorflow", "torch"], short=["tensorflow"]))
def test_keras(backend, size, case):
    printed, told = run(size, KERAS, "keras", KERAS_BACKEND=backend)
    assert f"passed {case}\n" in printed, told


def test_tensorflow():
    cases = ["training_is_that_of_one_worker", "layers_within_a_module_are_found"]
    printed, told = run(2, KERAS, "tensorflow", *cases)
    assert re.findall(r"passed (\w+)", printed) == cases, told

"""What the adapters take beside the framework stays small: no second framework, few copies of the model's state."""

import importlib.util

import pytest

from tests.launching import WORKERS, launch

# torch's tensors are broadcast where they are. For the others it was 1 to 2.5 times.
LIMITS = [("torch", "torch", 0.2), ("tensorflow", "tensorflow", 3.5), ("keras", "torch", 3.5)]


@pytest.mark.parametrize(("framework", "backend", "limit"), LIMITS)
def test_broadcasting_takes_few_copies_and_one_framework(framework, backend, limit):
    for package in {"keras", backend}:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    result = launch(2, [WORKERS / "memory_cases.py", framework, limit], environment={"KERAS_BACKEND": backend})
    assert result.returncode == 0, result.stderr[-3000:]

"""What the adapters take beside the framework stays small: no second framework, few copies of the model's state."""

import importlib.util

import pytest

from tests.launching import WORKERS, launch


@pytest.mark.parametrize(("framework", "backend"), [("tensorflow", "tensorflow"), ("keras", "torch")])
def test_broadcasting_takes_few_copies_and_one_framework(framework, backend):
    for package in {"keras", backend}:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    result = launch(2, [WORKERS / "memory_cases.py", framework], environment={"KERAS_BACKEND": backend})
    assert result.returncode == 0, result.stderr[-3000:]

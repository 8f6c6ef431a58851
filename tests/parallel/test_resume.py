"""A run stopped at any step and resumed is the uninterrupted one, to the bit."""

import pytest

from tests.launching import WORKERS, launch


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_what_fit_does_at_its_end(backend, tmp_path):
    result = launch(2, [WORKERS / "fit_cases.py", tmp_path], environment={"KERAS_BACKEND": backend})
    assert result.returncode == 0, result.stderr[-3000:]
    assert "fit ends well" in result.stdout


@pytest.mark.parametrize("size", [1, 3])
def test_stopped_at_every_step(size, tmp_path):
    result = launch(size, [WORKERS / "resume_cases.py", tmp_path])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "every stop resumed to the same bits" in result.stdout


@pytest.mark.parametrize("adapter", ["torch", pytest.param("keras", marks=pytest.mark.long)])
def test_random_numbers_of_a_gpu(adapter, tmp_path):
    """On GPUs whose generators are played."""
    environment = {"KERAS_BACKEND": "torch"} if adapter == "keras" else {}
    result = launch(2, [WORKERS / "played_cuda.py", tmp_path], environment=environment)
    assert "the GPU's random numbers go on" in result.stdout, result.stderr[-3000:]

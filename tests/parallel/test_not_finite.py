"""A gradient or loss that is not finite on one rank, or one rank's wish to stop, is met by all ranks alike."""

import pytest

from tests.launching import WORKERS, launch

FLAVOURS = [
    ("torch", ""),
    ("tensorflow", "tensorflow"),
    pytest.param("keras", "tensorflow", marks=pytest.mark.long),
    pytest.param("keras", "torch", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("framework", "backend"), FLAVOURS)
def test_all_ranks_do_the_same(framework, backend, tmp_path):
    environment = {"KERAS_BACKEND": backend} if backend else {}
    result = launch(2, [WORKERS / "trouble_cases.py", framework, tmp_path], environment=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("trouble met as promised") == 2
    assert result.stdout.count("stopped early by rank ") == 1
    assert result.stdout.count("step left out") == 1 + 10  # each run's first 10 have a line

"""The thread that reads ahead, in runs of real ranks."""

import pytest

from tests.launching import WORKERS, launch, some_long


@pytest.mark.parametrize("size", some_long([1, 2], short=[2]))
def test_the_thread_ends_with_its_loop(size, tmp_path):
    launcher = "none" if size == 1 else "mpirun"
    result = launch(size, [WORKERS / "reading_cases.py", tmp_path], launcher=launcher)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "all cases passed" in result.stdout

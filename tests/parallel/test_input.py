"""The frameworks' own input pipelines train as one process in numpy does, and resume to the same bits."""

import re

import pytest

from tests.launching import WORKERS, launch

PIPELINES = [("input_torch", ""), ("input_keras", "tensorflow"), ("input_keras", "torch")]
SHORT = [("input_torch", "", 3), ("input_keras", "tensorflow", 2)]
ALL = [(*pipeline, size) for pipeline in PIPELINES for size in (1, 2, 3)]


@pytest.mark.parametrize(
    ("worker", "backend", "size"), [pytest.param(*p, marks=() if p in SHORT else pytest.mark.long) for p in ALL]
)
def test_pipelines(worker, backend, size, tmp_path):
    environment = {"KERAS_BACKEND": backend} if backend else {}
    result = launch(size, [WORKERS / f"{worker}.py", tmp_path], environment=environment, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "all cases passed" in result.stdout
    audits = re.findall(r"^audit of epoch \d: (.*)$", result.stdout, flags=re.M)
    assert len(audits) >= 6 and set(audits) == {"22 samples, 0 missed, 0 repeated"}

"""The tensorflow adapter on real ranks."""

import re

import pytest

from tests.launching import WORKERS, launch, some_long

CASES = re.findall(r"@case\ndef (\w+)", (WORKERS / "tensorflow_cases.py").read_text())
RUNS: dict[int, tuple[str, str]] = {}
STALLED = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "30", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60"}


@pytest.fixture(params=some_long([1, 3], short=[3]))
def run(request):
    """What the worker printed with so many ranks; each size is launched once."""
    size = request.param
    if size not in RUNS:
        launcher = "none" if size == 1 else "mpirun"
        result = launch(size, [WORKERS / "tensorflow_cases.py"], launcher=launcher, environment=STALLED, timeout=560)
        RUNS[size] = (
            result.stdout,
            f"exit code {result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}",
        )
    return RUNS[size]


@pytest.mark.parametrize("case", CASES)
def test_case(case, run):
    printed, errors = run
    assert f"passed {case}\n" in printed, errors


def test_another_keras_backend_is_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import toolkit.adapters.tensorflow as dp\ndp.start()\n")
    result = launch(1, [script], launcher="none", environment={"KERAS_BACKEND": "torch"})
    assert result.returncode == 2 and result.stderr.strip().splitlines()[-1].startswith("error: "), result.stderr
    assert "KERAS_BACKEND=tensorflow" in result.stderr

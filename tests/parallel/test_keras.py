"""The keras adapter on real ranks, on both backends."""

import json
import re

import pytest

from tests.launching import WORKERS, launch

CASES = re.findall(r"@case\ndef (\w+)", (WORKERS / "keras_cases.py").read_text())
RUNS: dict[str, tuple[str, str]] = {}
STALLED = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "30", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60"}


def run(backend):
    """What the worker printed on two ranks; each backend is launched once."""
    if backend not in RUNS:
        environment = {"KERAS_BACKEND": backend, **STALLED}
        result = launch(2, [WORKERS / "keras_cases.py"], environment=environment, timeout=560)
        RUNS[backend] = (
            result.stdout,
            f"exit code {result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}",
        )
    return RUNS[backend]


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_case(case, backend):
    printed, errors = run(backend)
    assert f"passed {case}\n" in printed, errors


def test_names_of_state_are_the_same_on_both_backends():
    names = [json.loads(re.search(r"names (\[.*\])", run(backend)[0])[1]) for backend in ("tensorflow", "torch")]
    assert names[0] == names[1]
    assert "model/dense/kernel#2" in names[0] and "optimizer/dense/kernel/velocity#2" in names[0]


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_one_process_without_a_launcher(backend):
    cases = [
        "callback_broadcasts_before_the_first_batch",
        "metrics_are_those_over_all_samples",
        "averages_are_weighted",
    ]
    environment = {"KERAS_BACKEND": backend}
    result = launch(1, [WORKERS / "keras_cases.py", *cases], launcher="none", environment=environment)
    assert re.findall(r"passed (\w+)", result.stdout) == [c for c in CASES if c in cases], result.stdout


def test_mistakes_outside_of_a_started_job(tmp_path):
    script = tmp_path / "script.py"
    for code, text in (
        (
            "keras.backend.backend = lambda: 'jax'\nimport toolkit.adapters.keras as dp\ndp.start()",
            "jax backend",
        ),
        ("import toolkit.adapters.keras as dp\ndp.distribute(keras.optimizers.SGD(), None)", "call start()"),
    ):
        script.write_text(f"import keras\n{code}\n")
        result = launch(1, [script], launcher="none", environment={"KERAS_BACKEND": "tensorflow"})
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode != 0 and "rror: " in last and text in last, result.stderr

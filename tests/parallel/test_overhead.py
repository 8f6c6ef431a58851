"""The measurement of what a step costs on a GPU, on a CPU: that it trains both alike, and fails above its limits."""

import re

import pytest

from tests.gpu.overhead import FUSION, most_bytes, problems
from tests.launching import launch, some_long


def measured(size, framework, *options, backend="tensorflow"):
    command = ["-m", "tests.gpu.overhead", "--framework", framework, "--rounds", "1", "--steps", "1", *options]
    launcher = "none" if size == 1 else "mpirun"
    return launch(size, command, launcher=launcher, environment={"KERAS_BACKEND": backend})


KINDS = [("torch", ""), ("tensorflow", ""), ("keras", "tensorflow"), ("keras", "torch")]


@pytest.mark.parametrize("size", some_long([1, 2], short=[2]))
@pytest.mark.parametrize(
    ("framework", "backend"), KINDS[:1] + [pytest.param(*kind, marks=pytest.mark.long) for kind in KINDS[1:]]
)
def test_both_are_trained_alike(framework, backend, size):
    result = measured(size, framework, "--device", "cpu", backend=backend or "tensorflow")
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(rf"{framework} on cpu, {size} worker\(s\): bare .* ratio [\d.]+\n", result.stdout), result.stdout


def test_a_step_above_the_limit_fails():
    result = measured(1, "torch", "--device", "cpu", "--most-time", "0")
    assert result.returncode == 1 and "times a bare one's time, and at most 0.0 is allowed" in result.stderr


def test_without_a_gpu_it_refuses_where_one_is_asked_for():
    result = measured(1, "torch", "--device", "gpu")
    assert result.returncode != 0 and "sees no GPU" in result.stderr.splitlines()[-1]


def test_limits():
    alone = [most_bytes(framework, 1, 10**9) for framework in ("torch", "tensorflow", "keras")]
    assert alone == [10**7, 10**9 + 10**7, 10**9 + 10**7]
    assert most_bytes("torch", 2, 10**9) == 10**9 + 10**7 + FUSION
    assert problems(1.02, 1.02, 10**7, 10**7) == problems(9.0, None, None, 0) == []
    assert [line.split()[3] for line in problems(1.021, 1.02, 10**7 + 1, 10**7)] == ["1.0210", "10,000,001"]

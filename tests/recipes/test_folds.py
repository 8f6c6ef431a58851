"""Cross-validation by one command: the same folds and results one after the other and in groups, and as numpy's."""

import json
import re

import numpy as np
import pytest

from tests.launching import launch
from toolkit import datasets
from toolkit.sharding import k_fold


def cross_validate(output, recipe, size, *arguments, launcher="mpirun", environment=None):
    command = [f"recipes/{recipe}.py", "--output", output, *arguments]
    result = launch(size, command, launcher=launcher, environment=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout, {int(k): v for k, v in json.loads((output / "folds.json").read_text()).items()}


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    return cross_validate(tmp_path_factory.mktemp("folds") / "one", "linear_regression_torch", 1, "--folds", "3")


def test_each_fold_is_numpys_least_squares_of_the_other_folds(one_worker):
    data = datasets.diabetes()
    for fold, row in one_worker[1].items():
        train, held_out = k_fold(len(data), 3, fold - 1, seed=0)
        weights, bias = datasets.least_squares(data.x[train], data.y[train])
        errors = data.x[held_out] @ weights.T + bias - data.y[held_out]
        assert row["held_out_squared_error"] == pytest.approx(np.mean(errors**2), rel=1e-4)


def test_the_table_has_every_fold_with_mean_and_deviation(one_worker):
    printed, results = one_worker
    lines = printed.splitlines()
    begin = next(i for i, line in enumerate(lines) if re.match(r"fold +train loss", line))
    rows = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in lines[begin + 1 :]}
    values = np.array([list(results[fold].values()) for fold in (1, 2, 3)])
    assert list(rows) == ["1", "2", "3", "mean", "deviation"]
    np.testing.assert_allclose([rows[str(fold)] for fold in (1, 2, 3)], values, rtol=1e-3)
    np.testing.assert_allclose(rows["mean"], values.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(rows["deviation"], values.std(axis=0, ddof=1), rtol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "size", "launcher", "backend"),
    [
        ("linear_regression_torch", 3, "mpirun", ""),  # groups of 1 and 2 workers
        pytest.param("linear_regression_torch", 2, "horovodrun-gloo", "", marks=pytest.mark.long),
        pytest.param("linear_regression_tensorflow", 3, "mpirun", "", marks=pytest.mark.long),
        pytest.param("linear_regression_keras", 2, "horovodrun-gloo", "tensorflow", marks=pytest.mark.long),
        pytest.param("linear_regression_keras", 2, "horovodrun-gloo", "torch", marks=pytest.mark.long),
    ],
)
def test_groups_of_workers_train_folds_at_the_same_time(one_worker, recipe, size, launcher, backend, tmp_path):
    arguments = ("--folds", "3", "--fold-groups", "2")
    environment = {"KERAS_BACKEND": backend or "tensorflow"}
    _, found = cross_validate(tmp_path / "run", recipe, size, *arguments, launcher=launcher, environment=environment)
    assert found.keys() == one_worker[1].keys()
    for fold, row in found.items():
        for name in ("train_loss", "held_out_squared_error"):
            assert row[name] == pytest.approx(one_worker[1][fold][name], rel=1e-4), (fold, name)


def test_folds_are_resumed_each_from_where_it_stood(tmp_path):
    options = ("--folds", "2", "--epochs", "60", "--noise", "0.1")
    _, straight = cross_validate(tmp_path / "straight", "linear_regression_torch", 2, *options)
    result = launch(
        2,
        [
            "recipes/linear_regression_torch.py",
            "--output",
            tmp_path / "run",
            *options,
            "--fold",
            "2",
            "--max-steps",
            "55",
        ],
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["fold-2", "folds.json"]
    (tmp_path / "run" / "fold-1").mkdir()  # as of a job that was ended before its first checkpoint
    (tmp_path / "run" / "fold-1" / "metrics.jsonl").write_text("")
    _, resumed = cross_validate(tmp_path / "run", "linear_regression_torch", 2, *options, "--resume")
    assert resumed == straight
    _, merged = cross_validate(tmp_path / "run", "linear_regression_torch", 2, *options, "--fold", "1", "--resume")
    assert merged == straight


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--folds", "443"], "443 folds of 442 samples"),
        (["--folds", "3", "--fold-groups", "3"], "3 groups of 2 worker(s)"),
        pytest.param(["--folds", "1"], "--folds is '1'", marks=pytest.mark.long),
        pytest.param(["--folds", "3", "--fold", "4"], "--fold is 4: give 1 to 3", marks=pytest.mark.long),
        pytest.param(["--fold", "1"], "give --folds", marks=pytest.mark.long),
        pytest.param(["--folds", "3", "--fold", "1", "--fold-groups", "2"], "1 fold(s)", marks=pytest.mark.long),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, named, tmp_path):
    result = launch(2, ["recipes/linear_regression_torch.py", "--output", tmp_path / "run", *arguments])
    ours = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode == 2 and len(ours) == 1 and named in ours[0], result.stderr
    assert not (tmp_path / "run").exists()


WAITING = """
import time
import toolkit.adapters.torch as dp
world = dp.start(groups=2)
if world.group == 1:
    time.sleep(8)
assert dp.gather(world.rank) == list(range(world.size))
found = dp.gather((world.group, world.rank), all_groups=True)
assert found == [(0, 0), (1, 0), (1, 1)] and dp.average({"g": world.group})["g"] == world.group
if world.group == 1:
    time.sleep(2)
assert dp.gather(world.rank) == list(range(world.size))  # group 0 has long called stop()
print("met again")
dp.stop()
dp.stop()
"""


def test_a_group_that_is_done_early_waits_for_the_others(tmp_path):
    """Longer than Horovod would let a rank wait."""
    (tmp_path / "script.py").write_text(WAITING)
    impatient = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "2", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "4"}
    result = launch(3, [tmp_path / "script.py"], environment=impatient)
    assert result.returncode == 0 and result.stdout.count("met again") == 3, result.stderr

"""One rank fails, vanishes, stalls or leaves early: the job ends in time, and its last lines say who, where and why."""

import json
from datetime import datetime

import pytest

from tests.faults import HOST, harm
from tests.launching import BIN

long = pytest.mark.long
LAUNCHERS_OWN = f'Traceback (most recent call last):\n  File "{BIN}/horovodrun"'


@pytest.mark.parametrize(
    ("framework", "launcher", "rank", "moment"),
    [
        ("torch", "mpirun", 1, "data"),
        ("tensorflow", "horovodrun-gloo", 1, "step"),
        pytest.param("torch", "mpirun", 0, "writing", marks=long),
        pytest.param("torch", "horovodrun", 0, "evaluation", marks=long),
        pytest.param("keras-tensorflow", "mpirun", 1, "data", marks=long),
        pytest.param("keras-torch", "horovodrun-gloo", 0, "step", marks=long),
    ],
)
def test_an_exception_is_told_once_with_its_traceback(framework, launcher, rank, moment, tmp_path):
    ended = harm(tmp_path / "run", "raise", rank, moment, framework=framework, launcher=launcher)
    assert not ended.problems("failed", limit=10)
    assert ended.stderr.count("OSError: the disk of this rank is gone") == 2  # the traceback's last line, and ours
    assert "Traceback" not in ended.stderr.split(ended.verdict)[1].replace(LAUNCHERS_OWN, "")
    error = ended.error
    assert (error["rank"], error["host"], error["exit_code"]) == (rank, HOST, 1)
    assert error["exception"] == "OSError: the disk of this rank is gone"
    assert "faulty.py" in error["traceback"] and "OSError" in error["traceback"]
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(error["time"])).total_seconds()) < 60


@pytest.mark.parametrize(
    ("framework", "launcher", "rank", "moment"),
    [
        ("torch", "mpirun", 1, "step"),
        pytest.param("torch", "horovodrun-gloo", 0, "step", marks=long),
        pytest.param("torch", "horovodrun", 1, "evaluation", marks=long),
        pytest.param("torch", "mpirun", 0, "checkpoint", marks=long),
        pytest.param("torch", "horovodrun-gloo", 1, "first", marks=long),
        pytest.param("tensorflow", "mpirun", 0, "step", marks=long),
        pytest.param("keras-tensorflow", "horovodrun-gloo", 1, "step", marks=long),
    ],
)
def test_a_killed_rank_is_named(framework, launcher, rank, moment, tmp_path):
    ended = harm(tmp_path / "run", "kill", rank, moment, framework=framework, launcher=launcher, size=3)
    assert not ended.problems("ended without a word", limit=10)
    if moment != "first":
        assert ended.error["rank"] == rank and ended.error["exception"] is None
        assert ended.error["cause"] == ended.verdict


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
@pytest.mark.parametrize("fault", ["raise", "kill"])
@pytest.mark.long
def test_a_failure_before_horovod_starts_is_the_launchers_to_name(fault, launcher, tmp_path):
    ended = harm(tmp_path / "run", fault, 1, "start", launcher=launcher)
    assert ended.code != 0 and ended.seconds < 10


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [("mpirun", 1), pytest.param("horovodrun-gloo", 0, marks=long), pytest.param("horovodrun-gloo", 1, marks=long)],
)
def test_a_stopped_rank_ends_the_job_in_time(launcher, rank, tmp_path):
    ended = harm(tmp_path / "run", "stop", rank, "step", launcher=launcher, stall_timeout=8)
    assert not ended.problems("it is stopped (SIGSTOP)", limit=30)
    assert f"warning: no sign of life of rank {rank}" in ended.stderr
    assert f"rank {1 - rank} on {HOST} waited for it in gradients0 when training at step" in ended.verdict


@pytest.mark.parametrize(
    ("framework", "launcher", "rank"),
    [
        ("torch", "mpirun", 1),
        pytest.param("tensorflow", "mpirun", 0, marks=long),
        pytest.param("tensorflow", "horovodrun-gloo", 1, marks=long),  # Horovod's own inspector looked at no rank there
        pytest.param("keras-tensorflow", "mpirun", 1, marks=long),
        pytest.param("keras-tensorflow", "horovodrun-gloo", 0, marks=long),
    ],
)
def test_a_rank_stuck_in_its_input_is_named_with_its_stack(framework, launcher, rank, tmp_path):
    ended = harm(tmp_path / "run", "sleep", rank, "data", framework=framework, launcher=launcher, stall_timeout=8)
    assert not ended.problems("did not come: it is", limit=30)
    stack = ended.error["stacks"][f"rank {rank} on {HOST}"]
    assert "time.sleep(600)" in stack and "with_noise" in stack
    assert f"[rank {rank} on {HOST}] |     time.sleep(600)" in ended.stderr


@long
def test_a_rank_stuck_alone_in_its_group_is_named(tmp_path):
    folds = ("--folds", "2", "--fold-groups", "2", "--epochs", "9")
    ended = harm(tmp_path / "run", "sleep", 1, "data", stall_timeout=8, arguments=folds)
    assert ended.code and ended.seconds < 30
    error = json.loads((tmp_path / "run" / "fold-2" / "error.json").read_text())
    name = f"rank 0 of group 1 on {HOST}"
    assert f"[{name}] {error['cause']}" in ended.stderr and "time.sleep(600)" in error["stacks"][name]
    assert error["cause"].startswith("did not come: it is training at step 18")
    assert f"rank 0 of group 0 on {HOST} waited for it in gather() of all groups" in error["cause"]


@pytest.mark.parametrize(
    ("launcher", "fault", "rank", "words"),
    [
        ("mpirun", "exit", 1, "left early: it ended its script without stop()"),
        pytest.param("horovodrun-gloo", "leave", 1, "left early: it called stop()", marks=long),
        pytest.param("horovodrun-gloo", "exit", 0, "left early: it ended its script", marks=long),
        pytest.param("mpirun", "leave", 0, "left early: it called stop()", marks=long),
        pytest.param("mpirun", "exit3", 1, "ended by sys.exit(3)", marks=long),
    ],
)
def test_a_rank_that_leaves_early_is_named(launcher, fault, rank, words, tmp_path):
    ended = harm(tmp_path / "run", fault, rank, "step", launcher=launcher)
    assert not ended.problems(words, limit=10)
    assert "step 18" in ended.verdict and ended.error["rank"] == rank

"""Who adds up gradients, and compression, on real ranks: every framework, both reducers, the launchers."""

import functools
import json
import re

import numpy as np
import pytest

from tests.launching import WORKERS, launch
from toolkit import checkpoint

SOURCE = (WORKERS / "reducer_cases.py").read_text()
CASES = re.findall(r"@case\ndef (\w+)", SOURCE)
ANYWHERE = re.findall(r"@case\ndef (\w+)", SOURCE[SOURCE.index("# What follows holds") :])
OWN = {
    name: re.findall(r'case\(\w+, "(\w+)"\)', (WORKERS / f"reducer_{name}.py").read_text())
    for name in ("torch", "keras")
}
KERAS_ON_TORCH = {"KERAS_BACKEND": "torch"}

# adapter, groups, number of ranks, launcher, environment, cases
JOBS = {
    "torch, 2 ranks": ("torch", 1, 2, "mpirun", {}, CASES + OWN["torch"]),
    "torch, 3 ranks": ("torch", 1, 3, "mpirun", {}, CASES + OWN["torch"]),
    "torch, 2 groups of 2": ("torch", 2, 4, "mpirun", {}, CASES + OWN["torch"]),
    "torch, horovodrun --gloo": ("torch", 1, 2, "horovodrun-gloo", {}, ANYWHERE),
    "torch, alone": ("torch", 1, 1, "none", {}, ANYWHERE),
    "tensorflow, 2 ranks": ("tensorflow", 1, 2, "mpirun", {}, CASES + OWN["keras"]),
    "tensorflow, 2 groups of 2": ("tensorflow", 2, 4, "mpirun", {}, CASES),
    "tensorflow, horovodrun --gloo": ("tensorflow", 1, 2, "horovodrun-gloo", {}, ANYWHERE),
    "tensorflow, alone": ("tensorflow", 1, 1, "none", {}, ANYWHERE),
    "keras on tensorflow, 2 ranks": ("keras", 1, 2, "mpirun", {}, CASES + OWN["keras"]),
    "keras on torch, 2 ranks": ("keras", 1, 2, "mpirun", KERAS_ON_TORCH, CASES),
    "keras on torch, 3 ranks": ("keras", 1, 3, "mpirun", KERAS_ON_TORCH, CASES),
    "keras on torch, horovodrun --gloo": ("keras", 1, 2, "horovodrun-gloo", KERAS_ON_TORCH, ANYWHERE),
    "keras on torch, alone": ("keras", 1, 1, "none", KERAS_ON_TORCH, ANYWHERE),
}
SHORT = [
    "torch, 3 ranks",
    "torch, 2 groups of 2",
    "torch, horovodrun --gloo",
    "torch, alone",
    "tensorflow, 2 ranks",
    "keras on torch, 2 ranks",
]


@functools.cache
def printed(job):
    """What a job printed, and how it ended; each is launched once."""
    adapter, groups, size, launcher, environment, cases = JOBS[job]
    environment = {"KERAS_BACKEND": "tensorflow", **environment}
    command = [WORKERS / "reducer_cases.py", adapter, groups, *cases]
    result = launch(size, command, launcher=launcher, environment=environment, timeout=400)
    return result.stdout, f"exit code {result.returncode}\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}"


def jobs_and_cases():
    for job in JOBS:
        for case in JOBS[job][-1]:
            marks = () if job in SHORT else pytest.mark.long
            yield pytest.param(job, case, marks=marks, id=f"{job}-{case}")


@pytest.mark.parametrize(("job", "case"), list(jobs_and_cases()))
def test_case(job, case):
    out, told = printed(job)
    assert re.search(rf"passed {case}$", out, re.MULTILINE), told


def of_a_run(adapter, backend, directory, case, launcher="mpirun"):
    """What three ranks of reducer_resume.py print."""
    command = [WORKERS / "reducer_resume.py", adapter, directory, case]
    result = launch(3, command, launcher=launcher, environment={"KERAS_BACKEND": backend}, timeout=240)
    assert result.returncode == 0 and f"passed {case}" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("adapter", "backend"),
    [
        ("torch", "torch"),
        pytest.param("tensorflow", "tensorflow", marks=pytest.mark.long),
        pytest.param("keras", "tensorflow", marks=pytest.mark.long),
        pytest.param("keras", "torch", marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_keeps_its_reducer_and_so_its_bits(adapter, backend, tmp_path):
    of_a_run(adapter, backend, tmp_path, "resumed")
    printed = of_a_run(adapter, backend, tmp_path, "without_mpi", "horovodrun-gloo")
    told = [line for line in printed.splitlines() if "were added up by mpi until here" in line]
    assert len(told) == 1 and "resume it with the launcher and device of its start" in told[0], printed[-3000:]


def test_deterministic_runs_try_no_reducer(tmp_path):
    of_a_run("torch", "torch", tmp_path, "deterministic")


@pytest.mark.long
def test_mpi_where_mpi_did_not_start_the_workers_is_one_line(tmp_path):
    command = ["recipes/linear_regression_torch.py", "--reducer", "mpi", "--output", tmp_path / "run"]
    result = launch(2, command, launcher="horovodrun-gloo")
    lines = [line for line in (result.stdout + result.stderr).splitlines() if 'reducer="mpi" needs' in line]
    assert result.returncode != 0 and lines, result.stderr[-3000:]
    assert all('mpirun, or horovodrun without --gloo, or use reducer="horovod"' in line for line in lines)
    assert 'linear_regression_torch.py", line' not in result.stdout + result.stderr, "a worker's traceback"


def test_a_wrong_reducer_in_the_environment_is_exit_code_2(tmp_path):
    command = ["recipes/linear_regression_torch.py", "--output", tmp_path / "run"]
    result = launch(2, command, environment={"HVDKIT_REDUCER": "pigeons"})
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "the reducer is 'pigeons': give one of auto, horovod, mpi." in result.stderr


@pytest.mark.parametrize("flag", ["--compression=zip", "--reducer=pigeons"])
def test_a_wrong_flag_is_exit_code_2(flag):
    result = launch(1, ["recipes/linear_regression_torch.py", flag], launcher="none")
    told = [line for line in result.stderr.splitlines() if flag.partition("=")[2] in line]
    assert result.returncode == 2 and len(told) == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]


# The recipe's CNN, 4 epochs of 45 steps. Without compression the loss falls to 0.07 of what it was in the first one.
EPOCHS, STEPS = 4, 45
FLAVOURS = {
    "torch": ("torch", {}),
    "tensorflow": ("tensorflow", {}),
    "keras on tensorflow": ("keras", {"KERAS_BACKEND": "tensorflow"}),
    "keras on torch": ("keras", {"KERAS_BACKEND": "torch"}),
}
# How far the last epoch's loss may be above that of none, as a share of none's; rounding alone moves it by 6 %.
# PowerSGD's was 10 % below to 35 % above it with 4 seeds, where none's own was 0.12 to 0.17. Of top-k's 1 % much is
# still owed after so few steps: the loss was 1.4 of none's above it.
DISTANCES = {"fp16": 0.15, "bf16": 0.15, "int8": 0.15, "topk": 2.0, "topk:0.1": 0.15, "powersgd": 0.6}


SHORT_RUNS = [
    ("torch", "int8"),
    ("torch", "topk:0.1"),
    ("tensorflow", "powersgd"),
]
SHORT_RESUMED = [("torch", "topk:0.1")]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Run the recipe on two ranks, once for each set of arguments; gives its output directory."""

    @functools.cache
    def run(flavour, scheme, *arguments, resumed=None):
        framework, environment = FLAVOURS[flavour]
        output = resumed or tmp_path_factory.mktemp("run") / "output"
        options = ["--output", output, "--epochs", EPOCHS, "--compression", scheme, *arguments]
        result = launch(2, [f"recipes/cnn_{framework}.py", *options], environment=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        return output

    return run


def rows(output):
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def losses(output):
    return [row["loss"] for row in rows(output) if row["kind"] == "step"]


def some_runs(schemes, short):
    """Every flavour with every scheme; those that are not in `short` are long."""
    pairs = [(flavour, scheme) for flavour in FLAVOURS for scheme in schemes]
    return [pytest.param(*pair, marks=() if pair in short else pytest.mark.long) for pair in pairs]


@pytest.mark.parametrize(("flavour", "scheme"), some_runs(DISTANCES, short=SHORT_RUNS))
def test_compression_converges_as_none_does(train, flavour, scheme):
    plain, compressed = losses(train(flavour, "none")), losses(train(flavour, scheme))
    assert len(plain) == len(compressed) == EPOCHS * STEPS
    assert compressed != plain, "the recipe compressed nothing"
    first, last, found = (np.mean(each) for each in (plain[:STEPS], plain[-STEPS:], compressed[-STEPS:]))
    assert last < 0.1 * first
    assert found < (1 + DISTANCES[scheme]) * last


@pytest.mark.parametrize(("flavour", "scheme"), some_runs(("int8", "topk:0.1", "powersgd"), short=SHORT_RESUMED))
def test_a_run_stopped_and_resumed_is_the_uninterrupted_one(train, flavour, scheme):
    straight = train(flavour, scheme)
    stopped = train(flavour, scheme, "--max-steps", str(STEPS + 7))
    before = checkpoint.newest(stopped)
    assert before.manifest["step"] == STEPS + 7
    assert any("compression/" in name and array.any() for name, array in before.state.items())
    train(flavour, scheme, "--resume", resumed=stopped)
    found, expected = checkpoint.newest(stopped), checkpoint.newest(straight)
    assert found.manifest["step"] == expected.manifest["step"] == EPOCHS * STEPS
    assert found.state.keys() == expected.state.keys()
    differ = [name for name, array in expected.state.items() if found.state[name].tobytes() != array.tobytes()]
    assert not differ
    assert losses(stopped) == losses(straight)


def test_horovods_threads_do_not_wait_for_each_other_where_mpi_adds_up():
    """Its source is corrected for that: without it a thread wanted a core up to all of the time, after a late one."""
    result = launch(2, [WORKERS / "idle_horovod.py"], timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    shares = json.loads(re.search(r"FOUND (.*)", result.stdout)[1])
    assert min(map(max, zip(*shares, strict=True))) < 0.3, shares

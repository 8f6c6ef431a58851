"""Under horovodrun's elastic mode workers are killed and others come: the run's result is that of one left alone."""

import re
import signal

import pytest
from horovod.common.exceptions import HorovodInternalError

from tests.elastic_job import HOSTS, ElasticJob, outcome
from tests.launching import ROOT, WORKERS, launch
from toolkit import checkpoint, output, verify
from toolkit.elastic import Membership
from toolkit.errors import RunFailed

EPOCHS, STEPS = 12, 84


OPTIONS = ["--epochs", str(EPOCHS), "--learning-rate", "0.1", "--audit", "--check-sync", "5", "--print-every", "4"]
CASES = [
    ("torch", "tensorflow", 3),
    pytest.param("tensorflow", "tensorflow", 2, marks=pytest.mark.long),
    pytest.param("keras", "tensorflow", 2, marks=pytest.mark.long),
    pytest.param("keras", "torch", 2, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("framework", "backend", "size"), CASES)
def test_killed_joined_and_killed_again(framework, backend, size, tmp_path):
    """Rank 0 dies, another worker comes, and rank 0 dies again: of two, the one that came has the run then."""
    recipe = ROOT / f"recipes/linear_regression_{framework}.py"
    few, options = size - 1, [*OPTIONS, "--batch-size", str(-(-64 // size))]  # of the start's workers: 7 steps an epoch
    environment = {"KERAS_BACKEND": backend, "KILL": f"{size}:0:27,{size}:0:55", "HOLD": f"{few}:43"}
    command = [WORKERS / "elastic_cases.py", recipe, "--output", tmp_path / "run", "--commit-steps", "4", *options]
    with ElasticJob(tmp_path / "job", command, HOSTS[:size], environment=environment) as job:
        job.wait_until(lambda: f"step 24 in {tmp_path / 'run'}; {few} worker(s)" in job.printed(), "going on with less")
        job.set_hosts([*job.workers(), HOSTS[size]])
        assert job.wait() == 0, job.printed()
        printed = job.printed()
    (joined,) = re.findall(rf"going on from memory at epoch \d+, step (\d+) in \S+; {size} worker", printed)
    assert 24 <= int(joined) <= 44, "at a commit, once the news was there"
    assert f"going on from memory at epoch 7, step 52 in {tmp_path / 'run'}; {few} worker(s)" in printed
    audits = re.findall(r"audit of epoch (\d+): 442 samples, 0 missed, 0 repeated", printed)
    assert sorted({int(epoch) for epoch in audits}) == list(range(1, EPOCHS + 1))

    alone = launch(size, [recipe, "--output", tmp_path / "alone", *options], environment={"KERAS_BACKEND": backend})
    assert alone.returncode == 0, alone.stderr[-3000:]
    for kind, count in (("step", STEPS), ("epoch", EPOCHS)):
        rows = output.read_metrics(tmp_path / "run", kind)
        assert [row[kind] for row in rows] == list(range(1, count + 1))
    found = verify.compare(outcome(tmp_path / "alone", 7), outcome(tmp_path / "run", 7), 1e-4)
    assert found.passes(1e-4), found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.long
def test_told_to_stop_a_worker_leaves_alone_and_the_launcher_with_what_was_held_saved(number, tmp_path):
    """Both times rank 0 saves its commit: it can't tell whether the launcher was told, or this worker alone."""
    run, step_file = tmp_path / "run", tmp_path / "step"
    recipe = ROOT / "recipes/linear_regression_torch.py"
    command = [recipe, "--global-batch-size", "64", "--epochs", "50", "--commit-steps", "4", "--output", run]
    with ElasticJob(
        tmp_path / "job",
        [WORKERS / "elastic_cases.py", *command],
        HOSTS[:3],
        environment={"PACE": "0.1", "STEP": str(step_file)},
    ) as job:

        def tell_at(step, rank=None):
            job.wait_until(lambda: step_file.exists() and int(step_file.read_text() or 0) >= step, f"step {step}")
            job.tell(number, rank)

        tell_at(10, rank=0)
        job.wait_until(lambda: f"in {run}; 2 worker(s)" in job.printed(), "going on without it")
        tell_at(30)
        assert job.wait(60) != 0
        printed = job.printed()
    told = re.findall(r"told to stop by SIG\w+; step (\d+) is saved; .*to go on: (horovodrun .* --resume)", printed)
    assert len(told) == 2 and 8 <= int(told[0][0]) < 28 <= int(told[1][0]), printed
    assert [int(path.name[-8:]) for path in checkpoint.steps(run)] == [int(step) for step, _ in told], printed
    resumed = launch(2, [*command, "--resume", "--max-steps", "40"])
    assert f"step {told[1][0]} in" in resumed.stdout and resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in output.read_metrics(run, "step")] == list(range(1, 41))


@pytest.mark.long
def test_workers_that_are_stuck_end_and_the_others_go_on(tmp_path):
    """Two at once, which still have each other's connection."""
    command = [WORKERS / "elastic_cases.py", ROOT / "recipes/linear_regression_torch.py", "--output", tmp_path / "run"]
    command += ["--global-batch-size", "64", "--epochs", "5", "--stall-timeout", "6"]
    with ElasticJob(tmp_path / "job", command, HOSTS[:3], environment={"STICK": "3:1:17,3:2:17"}) as job:
        assert job.wait() == 0, job.printed()
        printed = job.printed()
    stuck = re.findall(r"\[rank (\d) on \S+\] elastic: this worker ends: it was stuck for 6 s when training", printed)
    assert sorted(stuck) == ["1", "2"], printed
    assert "going on from memory at epoch 2, step 14" in printed and "; 1 worker(s)" in printed, printed
    assert [row["step"] for row in output.read_metrics(tmp_path / "run", "step")] == list(range(1, 36))


@pytest.mark.long
def test_a_run_that_has_stopped_stays_so_and_one_resumed_with_fewer_workers_keeps_its_batch(tmp_path):
    run, recipe = tmp_path / "run", ROOT / "recipes/linear_regression_torch.py"
    command = [WORKERS / "elastic_cases.py", recipe, "--output", run, "--epochs", "8", "--batch-size", "32"]
    with ElasticJob(tmp_path / "1", command, HOSTS[:2], environment={"STOP": "17", "LEAVE": "2:1"}) as job:
        assert job.wait() == 0, job.printed()
        assert "going on from memory" in job.printed() and "complete already" not in job.printed(), job.printed()
    stopped = checkpoint.newest(run).manifest["step"]
    assert stopped in (18, 19) and len(output.read_metrics(run, "step")) == stopped
    with ElasticJob(tmp_path / "2", [*command, "--resume"], HOSTS[:1]) as job:
        assert job.wait() == 0, job.printed()
        assert re.search(rf"resumed at .* step {stopped} in .*; 1 worker\(s\), 64 samples a step", job.printed())
    assert len(output.read_metrics(run, "step")) == 56


SCRIPT = f"""
import os, runpy, sys
from dataclasses import replace
recipe = runpy.run_path("{ROOT}/recipes/linear_regression_torch.py")
dp, train = recipe["dp"], recipe["datasets"].diabetes()
options = recipe["parse"](recipe["Options"], None)
world = dp.start(**options.start)
for name, steps, newcomers_rate in FITS:
    rate = newcomers_rate if os.environ["HOROVOD_HOSTNAME"] == "{HOSTS[2]}" else options.learning_rate
    its = replace(options, output=options.output / name, max_steps=steps, learning_rate=rate)
    recipe["fit"](world, its, train, train.take([]))
dp.stop()
"""


@pytest.mark.parametrize(
    ("fits", "named"),
    [
        ([("first", 7, 0.4), ("second", 35, 0.4)], "the others train in fit() number 2 of this script already"),
        ([("second", 35, 0.5)], "second has learning_rate 0.4, this run has learning_rate 0.5: start the workers"),
    ],
)
@pytest.mark.long
def test_a_worker_that_would_train_another_run_is_refused_and_the_others_go_on(fits, named, tmp_path):
    """With a script's second fit under way, which they begin with as many as they are by then, or other options."""
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT.replace("FITS", repr(fits)))
    command = [WORKERS / "elastic_cases.py", script, "--output", run, "--global-batch-size", "64"]
    with ElasticJob(tmp_path / "job", command, HOSTS[:2], environment={"KILL": "2:1:3", "HOLD": "1:16"}) as job:
        job.wait_until(lambda: "/second; 1 worker(s)" in job.printed(), "the last fit with one worker")
        job.set_hosts([*job.workers(), HOSTS[2]])
        assert job.wait() == 0, job.printed()
        printed = job.printed()
    assert named in printed and printed.count("error: ") == 1 and "Traceback" not in printed, printed
    assert printed.count("elastic: a worker was lost") == 2, printed
    for name, steps, _ in fits:
        assert [row["step"] for row in output.read_metrics(run / name, "step")] == list(range(1, steps + 1))


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ([ROOT / "recipes/linear_regression_torch.py", "--folds", "3"], "--folds in an elastic job"),
        ([WORKERS / "audit_cases.py"], "decorate its fit(world, options, …) with @elastic(dp)"),
    ],
)
def test_what_elastic_mode_cannot_do_is_one_line(command, named, tmp_path):
    environment = {"HOROVOD_ELASTIC": "1", "PLANTED": ""}
    result = launch(1, [*command, "--output", tmp_path / "run"], launcher="none", environment=environment)
    assert result.returncode == 2 and named in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_an_error_that_no_other_worker_causes_ends_the_run():
    """Such as gradients of other shapes on each rank: it comes back with whatever workers there are."""
    membership = Membership(adapter=None, number=0)
    lost = HorovodInternalError("a collective operation failed")

    def keep(step):
        membership.keep(checkpoint.Checkpoint(None, {"position": {"step": step}}, {}))

    assert not membership.outlives(ValueError("Horovod is no part of this"))
    for step in (0, 10):
        keep(step)
        outlived = []
        for _ in range(4):
            outlived.append(membership.outlives(lost))
            keep(step)  # as each attempt does where it begins
        assert outlived == [True] * 3 + [False]


def test_an_error_that_comes_back_ends_the_job_by_itself(tmp_path):
    recipe = ROOT / "recipes/linear_regression_torch.py"
    command = [WORKERS / "elastic_cases.py", recipe, "--output", tmp_path / "run", "--global-batch-size", "64"]
    with ElasticJob(tmp_path / "job", command, HOSTS[:2], environment={"MISMATCH": "17"}) as job:
        assert job.wait(120) != 0
        printed = job.printed()
    assert printed.count("going on from memory at epoch 2, step 14") == 3, printed
    assert printed.count("elastic: a worker was lost") == 6 and "[rank 1 on" in printed


def test_the_newest_commit_counts_and_of_several_the_lowest_ranks(tmp_path):
    """A commit may have come about on some of the workers only; one that comes holds none."""

    class Others:
        def gather(self, mine):
            return [(None, -1, 1), (tmp_path, 30, 1), (tmp_path, 40, 1), (tmp_path, 40, 1), mine]

    assert Membership(Others(), number=1).enter() == (2, tmp_path, 40)
    with pytest.raises(RunFailed, match=r"train in fit\(\) number 2 of this script already"):
        Membership(Others(), number=0).enter()

"""Under horovodrun's elastic mode workers are killed and others come: the run's result is that of one left alone."""

import re

import numpy as np
import pytest

from tests.elastic_job import HOSTS, ElasticJob
from tests.launching import ROOT, WORKERS, launch
from toolkit import checkpoint, output, verify

EPOCHS, STEPS = 12, 84


def outcome(directory):
    losses = [row["loss"] for row in output.read_metrics(directory, "step")]
    weights = {n: a for n, a in checkpoint.newest(directory).state.items() if n.startswith("model/")}
    return verify.Outcome(np.array(losses), weights, STEPS // EPOCHS)


@pytest.fixture
def options():
    return ["--epochs", str(EPOCHS), "--global-batch-size", "64", "--audit", "--check-sync", "5", "--print-every", "4"]


CASES = [
    ("torch", "tensorflow", 3),
    pytest.param("tensorflow", "tensorflow", 2, marks=pytest.mark.long),
    pytest.param("keras", "tensorflow", 2, marks=pytest.mark.long),
    pytest.param("keras", "torch", 2, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("framework", "backend", "size"), CASES)
def test_killed_joined_and_killed_again(framework, backend, size, options, tmp_path):
    """Rank 0 dies, another worker comes, and rank 0 dies again: of two, the one that came has the run then."""
    recipe = ROOT / f"recipes/linear_regression_{framework}.py"
    few = size - 1
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

    alone = launch(1, [recipe, "--output", tmp_path / "alone", *options], launcher="none", environment=environment)
    assert alone.returncode == 0, alone.stderr[-3000:]
    for kind, count in (("step", STEPS), ("epoch", EPOCHS)):
        rows = output.read_metrics(tmp_path / "run", kind)
        assert [row[kind] for row in rows] == list(range(1, count + 1))
    found = verify.compare(outcome(tmp_path / "alone"), outcome(tmp_path / "run"), 1e-4)
    assert found.passes(1e-4), found

"""`--check-sync` ends a run whose ranks part, and leaves BatchNorm's own statistics alone."""

import re

import pytest

from tests.launching import WORKERS, launch


@pytest.mark.parametrize(("every", "step"), [(1, 7), (4, 8)])
def test_a_changed_tensor_is_named(every, step, tmp_path):
    command = [WORKERS / "sync_cases.py", "--output", tmp_path / "run", "--check-sync", every]
    result = launch(3, command, timeout=60)
    assert result.returncode == 1
    found = re.search(r"^error: (.*)$", result.stderr, flags=re.M)[1]
    assert found.startswith(f"after step {step}, ranks 1 differ from rank 0 in model/2.bias (by up to 0.2"), found
    assert result.stderr.count("error: ") == 1, "told once"


def test_none_is_looked_for_without_it(tmp_path):
    command = [WORKERS / "sync_cases.py", "--output", tmp_path / "run", "--check-sync", "0", "--epochs", "2"]
    assert launch(3, command).returncode == 0


def test_a_model_that_ranks_do_not_share_is_never_saved(tmp_path):
    command = [WORKERS / "planted.py", "--output", tmp_path / "run", "--max-steps", "10"]
    result = launch(2, command, environment={"PLANTED": "no distribute"})
    assert result.returncode == 1 and "after step 10, ranks 1 differ" in result.stderr, result.stderr
    assert not list((tmp_path / "run").glob("step-*"))


def test_by_default_checks_take_one_percent_of_the_time():
    result = launch(2, [WORKERS / "sync_cadence.py"])
    assert result.returncode == 0, result.stderr
    checked = [int(step) for step in result.stdout.split()[1:]]
    # The first after 100 steps of some 1.2 ms; 200 ms are 1 % of 20 s. On whatever machine: more than 100 steps.
    assert checked[0] == 100 and (len(checked) == 1 or checked[1] - 100 > 100), checked

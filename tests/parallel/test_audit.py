"""`--audit` counts the samples that were really used, and names those missed or repeated."""

import re

import numpy as np
import pytest

from tests.launching import WORKERS, launch, some_long
from toolkit.sharding import KINDS, Sharding


def audited(size, bug, output, *arguments):
    command = [WORKERS / "audit_cases.py", "--output", output, "--audit", "--epochs", "1", *arguments]
    return launch(size, command, environment={"PLANTED": bug})


@pytest.mark.parametrize("kind", some_long(KINDS, short=["random"]))
@pytest.mark.parametrize("batch", some_long(["442", "50", "2"], short=["50", "2"]))
def test_nothing_missed_or_repeated(batch, kind, tmp_path):
    """Also with more ranks than samples in a batch."""
    result = audited(3, "", tmp_path / "run", "--global-batch-size", batch, "--sharding", kind)
    assert result.returncode == 0, result.stderr
    assert "audit of epoch 1: 442 samples, 0 missed, 0 repeated" in result.stdout


def test_samples_are_named_by_index(tmp_path):
    result = audited(2, "wrong samples", tmp_path / "run")
    lost = [next(Sharding(442, 32, 2).parts(0, 1, 2)).indices][0]  # rank 1's part of the third batch
    expected = sorted(set(lost) - {3})
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "audit of epoch 1" in line]
    assert f"442 samples, {len(expected)} missed, 1 repeated" in line
    assert f"missed: {', '.join(map(str, expected[:5]))} and {len(expected) - 5} more" in line
    assert line.endswith("repeated: 3")


def test_the_same_data_on_every_rank(tmp_path):
    result = audited(2, "same data on every rank", tmp_path / "run")
    used = np.concatenate([part.indices for part in Sharding(442, 32, 2).parts(0, 0)])
    assert result.returncode == 1
    assert re.search(rf"{442 - len(used)} missed, {len(used)} repeated", result.stderr), result.stderr

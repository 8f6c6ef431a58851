"""`--deterministic`: runs of three ranks repeat to the bit, also where the order of additions would vary."""

import re

from tests.launching import WORKERS, launch


def test_runs_repeat_to_the_bit():
    """By Gloo's all-reduce, in which a value's place in the buffer decides; without the flag these runs differ."""
    found = set()
    for _ in range(2):
        command = [WORKERS / "deterministic_cases.py", "--deterministic"]
        result = launch(3, command, launcher="horovodrun-gloo")
        assert result.returncode == 0, result.stderr[-3000:]
        found.add(re.search(r"weights (\{'\w+'\})", result.stdout)[1])
    assert len(found) == 1

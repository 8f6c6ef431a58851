"""`hvdkit verify` passes the recipes; `make proof` is the long form."""

import pytest

from tests.launching import launch, some_long
from tests.proof import recipes, verify

SHORT = ("cnn keras on tensorflow", "linear_regression torch")


@pytest.mark.parametrize("name", some_long(recipes(), short=SHORT))
def test_verify_passes(name):
    command = verify(name, ["-np", "1,2", "--steps", "10", "--once"], against=False)[1:]
    result = launch(1, command, launcher="none")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert rows["2 worker(s)"].endswith("pass")

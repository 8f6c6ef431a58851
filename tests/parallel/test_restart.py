"""`hvdkit restart`: a run that fails goes on from its last checkpoint, and ends as if nothing had been."""

import signal
import subprocess
import sys
import time

import pytest

from tests.launching import BIN, ROOT, WORKERS, clean_environment, launch
from toolkit import checkpoint

RECIPE = ROOT / "recipes" / "linear_regression_torch.py"
OPTIONS = ["--epochs", "6", "--global-batch-size", "64", "--checkpoint-every", "2"]
MPIRUN = [BIN / "mpirun", "-np", "2", "--oversubscribe", "--bind-to", "none", sys.executable]


def restart(*arguments, environment=None):
    line = [sys.executable, "-m", "toolkit.cli", "restart", *map(str, arguments)]
    whole = {**clean_environment(), **(environment or {})}
    return subprocess.run(line, env=whole, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What an undisturbed run ends with."""
    place = tmp_path_factory.mktemp("alone") / "run"
    alone = launch(2, [RECIPE, "--output", place, *OPTIONS])
    assert alone.returncode == 0, alone.stderr
    return checkpoint.newest(place).state


@pytest.mark.parametrize(
    ("step", "begin"),
    [("25", "run/step-00000014"), pytest.param("9", "from the beginning", marks=pytest.mark.long)],
)
def test_killed_under_mpirun_and_the_same_to_the_bit(step, begin, expected, tmp_path):
    """With a checkpoint and without; what a run without one has written is kept."""
    place, once = tmp_path / "run", tmp_path / "killed"
    command = [*MPIRUN, WORKERS / "elastic_cases.py", RECIPE, "--output", place, *OPTIONS]
    result = restart("--restarts", "2", "--", *command, environment={"KILL": f"2:1:{step}", "ONCE": str(once)})
    assert result.returncode == 0, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("hvdkit:")]
    assert begin in said and "restart 1 of 2" in said
    assert once.exists() and len(list(tmp_path.glob("run.failed-*"))) == (begin == "from the beginning")
    found = checkpoint.newest(place).state
    assert expected.keys() == found.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


COUNTING = """
import pathlib, sys, time
tries = pathlib.Path(sys.argv[1])
tries.write_text((tries.read_text() if tries.exists() else "") + " ".join(sys.argv[2:]) + "|")
print("begun", flush=True)
time.sleep(float(sys.argv[3]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def counting(tmp_path):
    """A command that notes each of its starts, takes some seconds and ends with a code."""
    (tmp_path / "counting.py").write_text(COUNTING)

    def command(code, seconds=0):
        return [sys.executable, tmp_path / "counting.py", tmp_path / "tries", code, seconds, "--output", tmp_path / "x"]

    return command, tmp_path / "tries"


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (1, 3), (2, 1), (130, 1), (143, 1)])
def test_only_failures_are_started_again(code, starts, counting):
    command, tries = counting
    result = restart("--restarts", "2", "--", *command(code))
    assert result.returncode == code and tries.read_text().count("|") == starts, result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_goes_on_to_the_command_and_ends_it_for_good(number, code, counting):
    command, tries = counting
    line = [sys.executable, "-m", "toolkit.cli", "restart", "--", *map(str, command(1, 600))]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline() == b"begun\n"
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) in (code, 128 + number)
        assert time.monotonic() - began < 60 and tries.read_text().count("|") == 1
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--", "true"], "no --output"),
        (["--restarts", "-1", "--", "true", "--output", "x"], "--restarts is -1"),
        (["--", "./nothing", "--output", "x"], "./nothing can't be run"),
    ],
)
def test_a_mistake_is_one_line(arguments, named):
    result = restart(*arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and named in result.stderr, result.stderr

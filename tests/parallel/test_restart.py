"""`hvdkit restart`: a run that fails goes on from its last checkpoint, and ends as if nothing had been."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launching import BIN, ROOT, WORKERS, clean_environment, launch
from toolkit import checkpoint, ending
from toolkit.forwarding import ForwardedSignals

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
    """With a checkpoint and without; the directory stays where it is."""
    place, once = tmp_path / "run", tmp_path / "killed"
    command = [*MPIRUN, WORKERS / "elastic_cases.py", RECIPE, "--output", place, *OPTIONS]
    result = restart("--restarts", "2", "--", *command, environment={"KILL": f"2:1:{step}", "ONCE": str(once)})
    assert result.returncode == 0, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("hvdkit:")]
    assert begin in said and "restart 1 of 2" in said
    assert once.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["killed", "run"]
    found = checkpoint.newest(place).state
    assert expected.keys() == found.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


COUNTING = """
import pathlib, sys, time
from toolkit import ending
tries = pathlib.Path(sys.argv[1])
tries.write_text((tries.read_text() if tries.exists() else "") + " ".join(sys.argv[2:]) + "|")
print("begun", flush=True)
time.sleep(float(sys.argv[3]))
ending.note(int(sys.argv[2]))
sys.exit(min(int(sys.argv[2]), int(sys.argv[4])))
"""


@pytest.fixture
def counting(tmp_path):
    """A command that notes each of its starts, takes some seconds and ends with a code, or `most`, as horovodrun."""
    (tmp_path / "counting.py").write_text(COUNTING)

    def command(code, seconds=0, most=255):
        script = [sys.executable, tmp_path / "counting.py", tmp_path / "tries"]
        return [*script, code, seconds, most, "--output", tmp_path / "x"]

    return command, tmp_path / "tries"


@pytest.mark.parametrize("most", [255, 1])
@pytest.mark.parametrize(("code", "starts"), [(0, 1), (1, 2), (2, 1), (130, 1), (143, 1)])
def test_only_failures_are_started_again(code, starts, most, counting):
    """Also where the launcher makes 1 of every code but 0."""
    command, tries = counting
    result = restart("--restarts", "1", "--", *command(code, most=most))
    assert result.returncode == code and tries.read_text().count("|") == starts, result.stderr


def test_a_note_counts_for_the_start_that_it_is_of(tmp_path, monkeypatch):
    with ending.Notes() as notes:
        monkeypatch.setenv(*next(iter(notes.environment.items())))
        (file,) = notes.environment.values()
        assert notes.last() is None
        for code in (1, 137, 143):
            ending.note(code)
        assert notes.last() == 143
        os.utime(file, (0, 0))  # of a worker that left an elastic job long before its end
        assert notes.last() is None
        ending.note(2)
        assert notes.last() == 2
        notes.clear()
        assert notes.last() is None
        os.unlink(file)
        ending.note(2)
        assert not os.path.exists(file), "on another host it is not made"


@pytest.mark.parametrize(
    ("noted", "told", "code"),
    [
        ([], None, 1),
        ([], signal.SIGINT, 130),  # killed by the launcher before it could note anything
        ([143], signal.SIGINT, 130),  # mpirun sends SIGTERM, whatever it gets
        ([130], signal.SIGTERM, 130),
        ([1], signal.SIGTERM, 1),  # such as where the last checkpoint could not be written
        ([2], None, 2),
    ],
)
def test_what_a_worker_has_noted_comes_before_the_signal(noted, told, code, monkeypatch):
    with ending.Notes() as notes:
        monkeypatch.setenv(*next(iter(notes.environment.items())))
        for one in noted:
            ending.note(one)
        assert notes.unhidden(1, told) == code and notes.unhidden(0, told) == 0 and notes.unhidden(3, told) == 3


def test_a_directory_that_is_not_empty_is_refused_at_once(counting, tmp_path):
    command, tries = counting
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("precious")
    result = restart("--", *command(1, most=1))
    assert result.returncode == 2 and "x is not an empty directory" in result.stderr and not tries.exists()
    result = restart("--restarts", "1", "--", *command(1, most=1), "--resume")
    assert tries.read_text().count("|") == 2 and os.listdir(tmp_path / "x") == ["thesis.tex"], result.stderr


ORPHANED = """
import subprocess, sys, time
from pathlib import Path
from toolkit.claim import Claim
place = Path(sys.argv[2])
if "--resume" in sys.argv:
    Claim(place).release()
    sys.exit(0)
place.mkdir()
holding = "from pathlib import Path; import sys, time; from toolkit.claim import Claim; held = Claim(Path(sys.argv[1]))"
holding += "; print(1, flush=True); time.sleep(3)"
child = subprocess.Popen([sys.executable, "-c", holding, place], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
sys.exit(1)
"""


def test_an_orphans_end_is_waited_for(tmp_path):
    result = restart("--", sys.executable, "-c", ORPHANED, "--output", tmp_path / "run")
    assert result.returncode == 0 and "waiting up to 120 s for its end" in result.stderr, result.stderr
    assert "restart 1 of 3" in result.stderr and "restart 2" not in result.stderr


def test_a_signal_while_the_command_is_being_started_is_handed_on(monkeypatch):
    real = subprocess.Popen

    def told_meanwhile(*arguments, **options):
        process = real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", told_meanwhile)
    began = time.monotonic()
    with ForwardedSignals() as signals:
        assert signals.follow(["sleep", "60"], os.environ) == 143
    assert time.monotonic() - began < 30 and signals.told


ENDS_WITH_1 = ["bash", "-c", 'trap "kill %1; exit 1" TERM INT; "$@" & wait', "launcher"]  # told to end, as mpirun


@pytest.mark.parametrize("launcher", [[], ENDS_WITH_1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_the_command_and_ends_it_for_good(number, launcher, counting):
    command, tries = counting
    line = [sys.executable, "-m", "toolkit.cli", "restart", "--", *launcher, *map(str, command(1, 600))]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline() == b"begun\n"
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == 128 + number
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

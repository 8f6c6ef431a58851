"""Runs whose disk fails, two runs in one directory, and what of the environment reaches the files: real launches."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launching import ROOT, WORKERS, begin, kill_marked, launch
from toolkit import checkpoint, output

LINEAR = ROOT / "recipes/linear_regression_torch.py"


@pytest.fixture
def small(tmp_path):
    """A disk of 2 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def trained(place, case, code=0):
    result = launch(2, [WORKERS / "disk_cases.py", place, case], timeout=120)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr[-3000:]
    return [line for line in result.stderr.splitlines() if str(place) in line]


def check_whole(place):
    assert checkpoint.steps(place)[-1].name == "step-00000020" and checkpoint.newest(place)
    assert [row["step"] for row in output.read_metrics(place, "step")] == list(range(1, 21))
    assert not [name for name in os.listdir(place) if name.startswith(".") or name.endswith(".lock")]


def test_a_full_disk_is_told_and_the_run_goes_on(small):
    warned, again = trained(small, "full")  # rows of metrics.jsonl still fit into its last page
    assert "No space left on device; training goes on" in warned and "can be written again" in again
    check_whole(small / "run")


@pytest.mark.long
def test_a_disk_full_to_the_end_fails_the_run_in_one_line(small):
    *_, line = trained(small, "full to the end", code=1)
    newest = small / "run" / "step-00000006"
    assert line == (
        f"error: the last checkpoint could not be written to {small}/run: No space left on device; "
        f"the last good one is {newest}: --resume goes on from there."
    )
    assert checkpoint.newest(small / "run").path == newest


def test_a_removed_directory_is_made_again(tmp_path):
    assert trained(tmp_path, "removed") == []
    check_whole(tmp_path / "run")


@pytest.mark.long
def test_what_took_the_directorys_place_is_left_alone_and_the_run_goes_on(tmp_path):
    lines = trained(tmp_path, "replaced for a while")
    assert sum("something else is there now; training goes on" in line for line in lines) == 2, lines
    check_whole(tmp_path / "run")
    assert checkpoint.newest(tmp_path / "moved").manifest["step"] == 6


@pytest.mark.long
def test_what_took_the_directorys_place_to_the_end_fails_the_run(tmp_path):
    lines = trained(tmp_path, "replaced to the end", code=1)
    assert "something else is there now; the last good one is none" in lines[-1]
    assert (tmp_path / "run").read_text() == "somebody's"


def test_a_read_only_disk_is_one_line_and_exit_code_2(small):
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    result = launch(2, [LINEAR, "--output", small / "run"])
    ours = [line for line in result.stderr.splitlines() if "error: " in line]
    assert result.returncode == 2 and len(ours) == 1 and "Read-only file system" in ours[0], result.stderr


def test_the_second_of_two_runs_is_refused_until_the_first_is_killed(tmp_path):
    place = tmp_path / "run"
    command = [LINEAR, "--epochs", "1000000", "--print-every", "1000000", "--output", place]
    # A checkpoint is saved at the first step only, so that the run is killed before it has one, or after.
    first, mark = begin(2, command, printed=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not (place / "metrics.jsonl").exists():
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.05)
        for size, resume in ((2, []), (1, ["--resume"])):
            second = launch(size, [*command, *resume])
            (line,) = [line for line in second.stderr.splitlines() if "error: " in line]
            assert second.returncode == 2 and re.search(r"another run has it, process \d+ on \S+, since \d{4}-", line)
        holder = int(re.search(r"process (\d+)", line)[1])
        assert b"linear_regression" in Path(f"/proc/{holder}/cmdline").read_bytes()
        os.kill(holder, signal.SIGKILL)
        first.wait(60)
    finally:
        kill_marked(mark)
        first.wait(60)
    shutil.copytree(place, tmp_path / "begun")
    for path in checkpoint.steps(tmp_path / "begun"):
        shutil.rmtree(path)
    (place / ".step-00000007.123.tmp").mkdir()
    resumed = launch(1, [LINEAR, "--resume", "--output", place, "--max-steps", "1"])
    assert resumed.returncode == 0 and not list(place.glob(".step*")), resumed.stderr
    anew = launch(1, [LINEAR, "--resume", "--output", tmp_path / "begun", "--max-steps", "1"])
    assert anew.returncode == 0 and "no checkpoint to resume yet, begun anew" in anew.stdout, anew.stderr
    assert checkpoint.newest(tmp_path / "begun").manifest["step"] == 1


def test_hostile_checkpoints_are_taken_or_refused_in_one_line(tmp_path):
    examples = os.environ.get("HVDKIT_FUZZ", "60")
    result = launch(1, [WORKERS / "hostile_cases.py", tmp_path, examples], launcher="none", timeout=3600)
    assert result.returncode == 0 and "refused in one line" in result.stdout, result.stderr[-5000:]


FAILING = """
import sys
sys.argv[0] = "fails.py"
import toolkit.adapters.torch as dp
world = dp.start(verbose=True)
dp.average({"a": 1.0})
if world.rank == 1:
    raise RuntimeError("this rank fails")
dp.average({"a": 1.0})
"""


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("horovodrun-gloo", marks=pytest.mark.long)])
def test_no_secret_of_the_environment_is_printed_or_written(tmp_path, launcher):
    """Nor the environment itself: a variable without meaning here stands for all of them."""
    secret = {"AWS_SECRET_ACCESS_KEY": "sesame-4711", "HVDKIT_UNRELATED": "sesame-4712"}
    (tmp_path / "fails.py").write_text(FAILING)
    place = tmp_path / "run"
    good = launch(
        2, [LINEAR, "-v", "--max-steps", "5", "--output", place], launcher=launcher, environment=secret, cwd=tmp_path
    )
    assert good.returncode == 0 and checkpoint.steps(place), good.stderr
    bad = launch(2, [tmp_path / "fails.py"], launcher=launcher, environment=secret, cwd=tmp_path)
    assert bad.returncode != 0 and "this rank fails" in bad.stderr
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert written
    for text in (good.stdout, good.stderr, bad.stdout, bad.stderr, written.decode("latin-1")):
        assert "sesame" not in text and "HVDKIT_UNRELATED" not in text and "AWS_SECRET" not in text

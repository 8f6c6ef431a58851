"""`hvdkit launch` with real launchers, on this machine.

Of other MPIs than the one installed here, HVDKIT_MPIRUNS names the `mpirun`s, as PATH names directories.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.launching import BIN, MARK, ROOT, clean_environment, kill_marked
from toolkit import launch
from toolkit.errors import UsageError
from toolkit.launch import Specification, command

RECIPE = ROOT / "recipes" / "linear_regression_torch.py"
OPTIONS = ["--epochs", "2", "--global-batch-size", "32"]


def begin(*arguments, environment=None):
    """`hvdkit launch` and the mark that all its processes carry."""
    mark = uuid.uuid4().hex
    line = [sys.executable, "-m", "toolkit.cli", "launch", *map(str, arguments)]
    full = {**clean_environment(), **(environment or {}), MARK: mark}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, env=full, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    ), mark


def run(*arguments, environment=None):
    process, mark = begin(*arguments, environment=environment)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        left = kill_marked(mark, grace=10)
    assert not left, f"still running 10 s after the end: {left}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("horovodrun", marks=pytest.mark.long)])
def test_a_recipe(launcher, tmp_path):
    place = tmp_path / "run"
    environment = {"MY_SECRET": "x"}
    wanted = ("-np", "2", "--launcher", launcher, "--tag-output", "--log-dir", tmp_path / "logs", "--interface", "lo")
    result = run(*wanted, "--", "python", RECIPE, "--output", place, *OPTIONS, environment=environment)
    assert result.returncode == 0, result.stderr
    first, *others = result.stdout.splitlines()
    assert first.startswith(f"{launcher} -np 2 -H localhost:2 ")
    (said,) = [line for line in others if "2 worker(s)" in line]
    assert said.startswith("[1,0]<stdout>:")
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert rows
    logs = [path for path in (tmp_path / "logs").rglob("*") if path.name == "stdout"]
    assert sorted(path.parent.name for path in logs) == ["rank.0", "rank.1"]
    assert sum("2 worker(s)" in path.read_text() for path in logs) == 1


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("horovodrun", marks=pytest.mark.long)])
def test_the_exit_code_is_the_failing_ranks(launcher):
    script = "import os, sys, time; rank = int(os.environ['OMPI_COMM_WORLD_RANK']); time.sleep(0 if rank else 60); "
    result = run("-np", "2", "--launcher", launcher, "--", "python", "-c", f"{script}sys.exit(7)")
    assert result.returncode == 7, result.stderr


def test_a_users_mistake_is_told_as_such():
    result = run("-np", "2", "--", "python", RECIPE, "--epochs", "none")
    assert result.returncode == 2, result.stderr


def test_a_host_that_cannot_be_reached_ends_with_what_to_do():
    result = run("-np", "2", "-H", "localhost:1,host.invalid:1", "--ssh-port", "2222", "--", "python", RECIPE)
    told = "`hvdkit doctor -H localhost:1,host.invalid:1 --ssh-port 2222` says which, and why."
    assert result.returncode == 255 and result.stderr.splitlines()[-1].endswith(told), result.stderr


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        pytest.param("mpirun", signal.SIGTERM, marks=pytest.mark.long),
        ("horovodrun", signal.SIGINT),  # which its shell alone would take, and go on
        pytest.param("mpirun", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("horovodrun", signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_signals_reach_the_run(launcher, number, tmp_path):
    place = tmp_path / "run"
    wanted = ("-np", "2", "--launcher", launcher)
    process, mark = begin(*wanted, "--", "python", RECIPE, "--output", place, "--epochs", "100000")
    try:
        end = time.monotonic() + 120
        while not (place / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        left = kill_marked(mark, grace=10)
    assert not left
    assert process.returncode == 128 + number, out + err
    assert re.search("stopped by SIG(TERM|INT)", out + err), out + err  # mpirun sends SIGTERM, whatever it gets
    assert list(place.glob("step-*"))


def mpirun(mpi, version):
    """An installed mpirun of this MPI, and what is known of it."""
    for path in [BIN / "mpirun", *map(Path, filter(None, os.environ.get("HVDKIT_MPIRUNS", "").split(os.pathsep)))]:
        environment = {**clean_environment(), "PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}"}
        try:
            found = launch.find("mpirun", environment)
        except UsageError:
            continue
        if (found.mpi, found.version[0]) == (mpi, version) or (found.mpi == mpi == "MPICH"):
            return found, environment
    return pytest.skip(f"no mpirun of {mpi} {version} is here: name one in HVDKIT_MPIRUNS")


@pytest.mark.parametrize(("mpi", "version"), [("Open MPI", 4), ("Open MPI", 5), ("MPICH", 5)])
def test_each_mpirun_takes_all_the_words(mpi, version, tmp_path):
    """3 ranks, more than cores or not, with all that this machine alone can use; the ranks' codes are 0, 0, 7."""
    installed, environment = mpirun(mpi, version)
    script = 'rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}; echo "$rank $PWD $NCCL_SOCKET_IFNAME $HVDKIT_X"; sleep 1; '
    given = Specification(
        command=("sh", "-c", script + "[ $rank != 2 ] || exit 7"),
        directory=str(tmp_path),
        ranks=3,
        interface="lo",
        tag_output=True,
        log_directory=f"{tmp_path}/logs",
    )
    (tmp_path / "logs").mkdir()
    environment = {**environment, "HVDKIT_X": "a b"}
    made = command(given, installed, environment)
    line = {"env": {**environment, **made.environment}, "timeout": 60, "capture_output": True, "text": True}
    result = subprocess.run(made.words, **line)
    assert result.returncode == 7, result.stdout + result.stderr
    said = result.stdout + "".join(path.read_text() for path in (tmp_path / "logs").rglob("*") if path.is_file())
    for rank in range(3):
        assert re.search(rf"^(\[(1,)?{rank}\](<stdout>: ?| ))?{rank} {tmp_path} lo a b$", said, re.MULTILINE), said

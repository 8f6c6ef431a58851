"""Start real ranks with the real launchers, and leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WORKERS = ROOT / "tests" / "parallel" / "workers"
MARK = "HVDKIT_TEST_PROCESS"
hides_gpus = True  # the tests are of workers on CPUs, also on a machine with GPUs; but for tests/gpu


def launch(
    size: int,
    command: Sequence[str | Path],
    *,
    launcher: str = "mpirun",
    options: Sequence[str] = ("--oversubscribe", "--bind-to", "none"),
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run `python <command>` on `size` ranks and return its exit code and what it printed.

    Args:
        size: number of ranks.
        command: script and arguments.
        launcher: mpirun, horovodrun, horovodrun-gloo, or none (one process, without any launcher).
        options: mpirun's.
        environment: added to this process's.
        timeout: seconds after which everything that was started is killed and `TimeoutExpired` is raised.
        cwd: working directory.

    Raises:
        AssertionError: a process that the command started was still there after its end.
    """
    process, mark = begin(size, command, launcher=launcher, options=options, environment=environment, cwd=cwd)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        kill_marked(mark)
        process.kill()
        process.communicate()
        raise
    left = kill_marked(mark, grace=10)
    assert not left, f"still running 10 s after the end: {left}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def begin(
    size: int,
    command: Sequence[str | Path],
    *,
    launcher: str = "mpirun",
    options: Sequence[str] = ("--oversubscribe", "--bind-to", "none"),
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    printed: IO[str] | int = subprocess.PIPE,
) -> tuple[subprocess.Popen[str], str]:
    """Begin what `launch` runs to its end.

    Args:
        printed: where both outputs go together; by default each to a pipe of its own.

    Returns:
        The launcher's process, and the mark that all processes of the job carry.
    """
    python = [sys.executable, *map(str, command)]
    line = {
        "none": python,
        "mpirun": [str(BIN / "mpirun"), "-np", str(size), *options, *python],
        "horovodrun": [str(BIN / "horovodrun"), "-np", str(size), "--mpi", *python],
        "horovodrun-gloo": [str(BIN / "horovodrun"), "-np", str(size), "--gloo", *python],
    }[launcher]
    mark = uuid.uuid4().hex
    full = {**clean_environment(), **(environment or {}), MARK: mark}
    process = subprocess.Popen(
        line,
        cwd=cwd,
        env=full,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=printed,
        stderr=subprocess.PIPE if printed == subprocess.PIPE else subprocess.STDOUT,
    )
    return process, mark


def clean_environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, with what all launches here need."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "HOROVOD_"))},
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        **({"CUDA_VISIBLE_DEVICES": ""} if hides_gpus else {}),
    }


def kill_marked(mark: str, grace: float = 0) -> list[str]:
    """Kill the processes that carry the mark in their environment and outlive `grace` seconds.

    Returns:
        The command lines of those that had to be killed.
    """
    end = time.monotonic() + grace
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return list(left.values())


def seconds_until_gone(mark: str, most: float) -> float:
    """How long it takes from now until no process carries the mark; at most `most` seconds are waited."""
    began = time.monotonic()
    while marked(mark) and time.monotonic() - began < most:
        time.sleep(0.02)
    return time.monotonic() - began


def marked(mark: str) -> dict[int, str]:
    """Process numbers and command lines of the processes that carry the mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
    return found


def some_long(values: Iterable[str | int], short: Sequence[str | int]) -> list[Any]:
    """Parameters of a test, all but `short` marked as long."""
    return [value if value in short else pytest.param(value, marks=pytest.mark.long) for value in values]

"""A rank's side of the benchmark: it takes steps when it is told to, and says how long they took.

Lines of JSON go both ways. The controller is `arena.py`, which stops this process between its turns.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tests.benchmarks.models import MODELS, Model

PORT, MODEL, RANK, SIZE, THREADS, DIRECTORY = (
    f"HVDKIT_BENCH_{name}" for name in ("PORT", "MODEL", "RANK", "SIZE", "THREADS", "DIRECTORY")
)
_PR_SET_PDEATHSIG = 1  # prctl(2)
Batch = TypeVar("Batch")


def model() -> Model:
    """The model to train."""
    return MODELS[os.environ[MODEL]]


def threads() -> int:
    """Compute threads that each rank of every contestant has."""
    return int(os.environ[THREADS])


def place() -> tuple[int, int]:
    """Rank and size of a process that asks no framework for them, by the arena or by Open MPI's mpirun."""
    names = (RANK, SIZE) if RANK in os.environ else ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    rank, size = (int(os.environ[name]) for name in names)
    return rank, size


def directory() -> Path:
    """For what a contestant writes; removed in the end."""
    return Path(os.environ[DIRECTORY])


def die_with_parent() -> None:
    """Have the kernel kill this process, stopped or not, when the one that started it has gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Over(Exception):
    """The benchmark asks for no more steps; raised where a training loop can't be left otherwise."""


class Turns:
    """Gives out steps as the controller asks for them.

    Args:
        rank: this process's.
        used_threads: compute threads that the framework says it uses.
        weights: gives the trained arrays with their names, in the same order on every rank.
    """

    def __init__(self, rank: int, used_threads: int, weights: Callable[[], Iterable[tuple[str, Any]]]) -> None:
        die_with_parent()
        self._weights = weights
        self._left = self._steps = 0
        self._began = 0.0
        self._peak = 0.0
        self.over = False
        self._lines = socket.create_connection(("127.0.0.1", int(os.environ[PORT]))).makefile("rw", encoding="utf-8")
        self._say(rank=rank, pid=os.getpid(), threads=used_threads)

    def take(self) -> bool:
        """Whether to take another step; waits for this rank's next turn where one is done."""
        if self._left == 0:
            if self._steps:
                self._say(seconds=time.perf_counter() - self._began, at=time.time())
            self._wait()
        self._left -= 1
        return not self.over

    def of(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The batches, again and again, one for each step."""
        step = 0
        while self.take():
            yield batches[step % len(batches)]
            step += 1

    def _wait(self) -> None:
        """Follow commands up to the next turn, which all ranks begin together."""
        while True:
            told = self._hear()
            if told["do"] == "weights":
                self._say(**self._save(told["path"]))
            elif told["do"] == "steps":
                self._left = self._steps = told["steps"]
                self._say(here=True)
                self._hear()  # every rank is here
                self._began = time.perf_counter()
                return
            else:
                self.over = True
                return

    def _save(self, path: str | None) -> dict[str, Any]:
        """Hash the weights, and write them to `path`; the memory that this takes is no part of the peak."""
        self._peak = max(self._peak, _peak_megabytes())
        digest = hashlib.sha256()
        if path:
            Path(path).mkdir()
        for i, (name, values) in enumerate(self._weights()):
            array = np.ascontiguousarray(values)
            digest.update(name.encode())
            digest.update(array)
            if path:
                np.save(f"{path}/{i}.npy", array)
        peak = self._peak
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak begins anew
        return {"digest": digest.hexdigest(), "peak_megabytes": peak}

    def _say(self, **message: Any) -> None:
        self._lines.write(json.dumps(message) + "\n")
        self._lines.flush()

    def _hear(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise SystemExit("the benchmark's controller has gone")
        return json.loads(line)


def _peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

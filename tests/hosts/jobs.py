"""A recipe's job on several hosts, by each launcher's own command line."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.hosts.cluster import INTERFACE, NAMES, Cluster
from tests.launching import BIN, launch
from toolkit import checkpoint

PREFIX = BIN.parent  # where an MPI from PyPI is installed, which other hosts are to be told
LAUNCHERS = ("mpirun", "horovodrun --mpi", "horovodrun --gloo", "hvdkit launch")


@dataclass(frozen=True)
class Places:
    """Hosts, and workers on each."""

    hosts: int
    slots: int

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES[: self.hosts]

    @property
    def workers(self) -> int:
        return self.hosts * self.slots

    def __str__(self) -> str:
        return f"{self.hosts} hosts × {self.slots}"


TWO, THREE = Places(2, 2), Places(3, 1)


@dataclass(frozen=True)
class Trained:
    """What a run computed, and where.

    Attributes:
        losses: of its steps.
        weights: names to arrays, at its end.
        seconds: from the launcher's start to its end.
        workers: hosts to the most workers that were seen there at a time.
        output: the run's directory.
    """

    losses: np.ndarray
    weights: dict[str, np.ndarray]
    seconds: float
    workers: dict[str, int]
    output: Path

    def difference(self, other: Trained) -> tuple[float, float]:
        """The largest difference of a loss, relative to it, and of a weight, relative to its tensor's largest."""
        assert self.losses.shape == other.losses.shape and self.weights.keys() == other.weights.keys()
        loss = np.abs(self.losses - other.losses) / np.abs(other.losses)
        weight = [np.abs(self.weights[n] - w).max() / np.abs(w).max() for n, w in other.weights.items()]
        return float(loss.max()), float(max(weight))


def words(launcher: str, places: Places, hostfile: Path, script: Sequence[str]) -> list[str]:
    """The command that a user gives on the first host."""
    hostfile.write_text("".join(f"{name} slots={places.slots}\n" for name in places.names))
    hosts = ["-np", str(places.workers), "--hostfile", str(hostfile)]
    elsewhere = f"--prefix {PREFIX}"
    return [
        *{
            "mpirun": ["mpirun", *hosts, *elsewhere.split(), "--bind-to", "none", "-x", "PATH", "-x", "PYTHONPATH"],
            "horovodrun --mpi": [
                "horovodrun",
                *hosts,
                "--mpi",
                "--mpi-args",
                elsewhere,
                "--network-interface",
                INTERFACE,
            ],
            "horovodrun --gloo": ["horovodrun", *hosts, "--gloo", "--network-interface", INTERFACE],
            "hvdkit launch": ["hvdkit", "launch", *hosts[2:], "--interface", INTERFACE, "--"],
        }[launcher],
        "python",
        *script,
    ]


def parent(pid: int) -> int | None:
    """The number of a process's parent; None where the process has ended."""
    try:
        return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def workers(cluster: Cluster, host: str) -> list[int]:
    """The processes on a host that are workers: not launchers or logins, nor what workers start themselves."""
    lines = cluster.processes(host).items()
    found = {pid for pid, line in lines if re.match(r"\S*python[\d.]* recipes/\w+\.py ", line)}
    return [pid for pid in found if parent(pid) not in {*found, None}]


def train(cluster: Cluster, launcher: str, places: Places, recipe: str, arguments: Sequence[str]) -> Trained:
    """Train a recipe on the cluster.

    Raises:
        AssertionError: it failed, or left a process on a host.
    """
    output = cluster.directory / f"{recipe}-{time.monotonic_ns()}"
    command = words(launcher, places, cluster.hostfile, [f"recipes/{recipe}.py", "--output", str(output), *arguments])
    began, seen = time.monotonic(), dict.fromkeys(NAMES, 0)
    with (cluster.directory / "printed").open("w+") as printed:
        process, _ = cluster.begin(NAMES[0], command, printed=printed)
        while process.poll() is None and time.monotonic() - began < 240:
            for name in NAMES:
                seen[name] = max(seen[name], len(workers(cluster, name)))
            time.sleep(0.2)
        seconds = time.monotonic() - began
        left = cluster.kill_all(grace=10 if process.poll() is not None else 0)
        process.wait(30)
        printed.seek(0)
        text = printed.read()
    assert process.returncode == 0 and not left, f"{' '.join(command)}: {process.returncode}, {left}\n{text[-3000:]}"
    return _trained(output, seconds, seen, places.workers)


def train_here(directory: Path, size: int, recipe: str, arguments: Sequence[str]) -> Trained:
    """Train a recipe on this machine, by mpirun, with as many workers."""
    began = time.monotonic()
    result = launch(size, [f"recipes/{recipe}.py", "--output", directory, *arguments])
    assert result.returncode == 0, result.stderr[-3000:]
    return _trained(directory, time.monotonic() - began, {}, size)


def _trained(output: Path, seconds: float, seen: dict[str, int], size: int) -> Trained:
    newest = checkpoint.newest(output)
    assert newest.manifest["world_size"] == size
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = np.array([row["loss"] for row in rows if row["kind"] == "step"])
    weights = {name: array for name, array in newest.state.items() if name.startswith("model/")}
    return Trained(losses, weights, seconds, seen, output)

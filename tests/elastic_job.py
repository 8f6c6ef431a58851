"""An elastic job under the real horovodrun, on one machine: hosts come and go, workers are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from tests.launching import BIN, MARK, ROOT, clean_environment, kill_marked, marked
from toolkit import checkpoint, output, verify

# Names of this machine that need no ssh; Horovod takes each for a host of its own.
HOSTS = ("localhost", "127.0.0.1", "127.1", "127.0.1")


class ElasticJob:
    """`horovodrun --host-discovery-script` of one worker a host; leaving it kills what is left.

    Args:
        place: a directory for the hosts and the output.
        command: script and arguments.
        hosts: the first ones.
        environment: added to this process's.
        options: horovodrun's.
    """

    def __init__(
        self,
        place: Path,
        command: Sequence[str | Path],
        hosts: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._hosts, self._mark = place / "hosts", uuid.uuid4().hex
        self._out, self._err = place / "stdout", place / "stderr"
        self.set_hosts(hosts)
        script = place / "hosts.sh"
        script.write_text(f"#!/bin/sh\ncat {self._hosts}\n")
        script.chmod(0o755)
        line = [
            *(str(BIN / "horovodrun"), "-np", str(len(hosts)), "--min-np", "1", "--max-np", str(len(HOSTS))),
            *("--host-discovery-script", str(script), "--network-interface", "lo", "--elastic-timeout", "60", *options),
            *(sys.executable, *map(str, command)),
        ]
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                line,
                cwd=ROOT,
                env={**clean_environment(), **(environment or {}), MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def __enter__(self) -> ElasticJob:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is not None:
            kill_marked(self._mark)
        left = kill_marked(self._mark, grace=15)
        self._process.kill()
        self._process.wait()
        assert kind is not None or not left, f"still running 15 s after the end: {left}"

    def set_hosts(self, hosts: Sequence[str]) -> None:
        """What the discovery script prints from now on; Horovod asks it once a second."""
        temporary = self._hosts.with_suffix(".new")
        temporary.write_text("".join(f"{host}:1\n" for host in hosts))
        temporary.replace(self._hosts)

    def workers(self, variable: str = "HOROVOD_HOSTNAME") -> dict[str, int]:
        """The process on each host, or of each value that another variable had at its start."""
        found = {}
        for pid in marked(self._mark):
            try:
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            names = [v.partition(b"=")[2].decode() for v in environ if v.startswith(f"{variable}=".encode())]
            found.update(dict.fromkeys(names, pid))
        return found

    def kill(self, host: str) -> float:
        """`kill -9` the worker on a host; when it was done."""
        os.kill(self.workers()[host], signal.SIGKILL)
        return time.monotonic()

    def tell(self, number: int, rank: int | None = None) -> None:
        """Send a signal to the launcher, or to the worker that began with this rank."""
        os.kill(self._process.pid if rank is None else self.workers("HOROVOD_RANK")[str(rank)], number)

    def wait_until(self, holds: Callable[[], bool], what: str, timeout: float = 120) -> float:
        """When something came to hold."""
        end = time.monotonic() + timeout
        while not holds():
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{what} did not come about\n{self.printed()[-6000:]}")
            time.sleep(0.02)
        return time.monotonic()

    def wait(self, timeout: float = 180) -> int:
        """horovodrun's exit code."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end\n{self.printed()[-6000:]}") from None

    def printed(self) -> str:
        """All output so far."""
        return self._out.read_text() + self._err.read_text()


def outcome(directory: Path, steps_per_epoch: int) -> verify.Outcome:
    """The losses of all of a run's steps and its last weights, to compare."""
    losses = [row["loss"] for row in output.read_metrics(directory, "step")]
    weights = {n: a for n, a in checkpoint.newest(directory).state.items() if n.startswith("model/")}
    return verify.Outcome(np.array(losses), weights, steps_per_epoch)


def last_step(directory: Path) -> int:
    """The last step whose row is written, 0 without any."""
    try:
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max((row["step"] for row in rows), default=0)

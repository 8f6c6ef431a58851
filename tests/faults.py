"""Bring one rank of a real recipe to harm, and look how the job ends."""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.launching import WORKERS, launch

HOST = socket.gethostname()
# What ranks say that failed only because another had.
SECONDARY = ("HorovodInternalError", "errors_impl.", "Horovod has been shut down")


@dataclass
class Ended:
    """How a job ended.

    Attributes:
        code: the launcher's exit code.
        stderr: what all of them printed there.
        seconds: from the fault until every process was gone.
        error: error.json's content, where there is one.
        rank: that came to harm.
    """

    code: int
    stderr: str
    seconds: float
    error: dict[str, Any] | None
    rank: int

    @property
    def verdict(self) -> str:
        """Our last line: who, where and why."""
        found = re.findall(rf"\[rank {self.rank} on {re.escape(HOST)}\] (?!\||warning)(.*)", self.stderr)
        return found[-1] if found else ""

    def problems(self, words: str, limit: float) -> list[str]:
        """What is otherwise than promised: the exit code, the time, the cause, and no word of the others' errors."""
        found = []
        if self.code == 0:
            found.append("exit code 0")
        if self.seconds > limit:
            found.append(f"took {self.seconds:.1f} s, not {limit:g}")
        if words not in self.verdict:
            found.append(f"no {words!r} of rank {self.rank}: {self.stderr[-1500:]}")
        others = [line for line in self.stderr.splitlines() if f"[rank {self.rank} on {HOST}]" not in line]
        found += [f"a consequence was shown: {line}" for line in others if any(text in line for text in SECONDARY)]
        return found


def harm(
    output: Path,
    fault: str,
    rank: int,
    moment: str,
    *,
    framework: str = "torch",
    launcher: str = "mpirun",
    size: int = 2,
    stall_timeout: float = 300,
    arguments: tuple[str, ...] = (),
) -> Ended:
    """Run the linear regression, one rank of which comes to harm; see `workers/faulty.py`."""
    name, _, backend = framework.partition("-")
    recipe = f"recipes/linear_regression_{name}.py"
    options = ["--output", output, "--epochs", "100000", "--global-batch-size", "64", "--learning-rate", "0.1"]
    every = "1" if moment in ("checkpoint", "writing") else "100000"
    options += ["--print-every", "100000", "--checkpoint-every", every]
    result = launch(
        size,
        [WORKERS / "faulty.py", fault, str(rank), moment, recipe, *map(str, options), *arguments]
        + ["--stall-timeout", str(stall_timeout)],
        launcher=launcher,
        environment={"KERAS_BACKEND": backend or "tensorflow"},
        timeout=120,
    )
    gone = time.time()
    began = re.search(r"FAULT ([\d.]+)", result.stderr)
    assert began, f"the fault never came: {result.stderr[-2000:]}"
    file = output / "error.json"
    error = json.loads(file.read_text()) if file.exists() else None
    return Ended(result.returncode, result.stderr, gone - float(began[1]), error, rank)

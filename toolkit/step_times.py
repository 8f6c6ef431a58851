"""How long each step of a run takes, on its slowest rank; asked for by a variable, as `hvdkit tune` does."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import tuned, tuning
from toolkit.adapters import Adapter
from toolkit.files import write_whole
from toolkit.world import World

VARIABLE = "HVDKIT_STEP_TIMES"  # the path of the file that rank 0 writes; alike on all ranks


class StepTimes:
    """Notes the seconds that each step takes, from the end of what came before it to the end of its `Run.log`.

    What comes between epochs (evaluation, the epoch's metrics, a checkpoint's copy) is not in them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: list[float] = []
        self.begin()

    def begin(self) -> None:
        """The coming step begins here."""
        self._began = time.perf_counter()

    def end_step(self) -> None:
        """A step has ended, and the next one begins."""
        now = time.perf_counter()
        self._seconds.append(now - self._began)
        self._began = now

    def write(self, name: str, world: World, adapter: Adapter, model: Any) -> None:
        """Write each step's time on its slowest rank, and where it was measured; every rank calls it.

        Raises:
            OSError: rank 0 can't write the file.
        """
        slowest = np.max(adapter.gather(self._seconds), axis=0)
        if world.rank == world.group == 0:
            described = adapter.describe(model)
            found = {
                "name": name,
                "framework": described.get("backend") or described["framework"],
                "workers": world.size * world.groups,
                "local_workers": world.local_size,
                "cores": tuning.host_cores(),
                "device": "cpu" if world.device == "cpu" else "gpu",
                "mpi": tuning.mpi_of(),
                "options": tuned.options_of(sys.argv[1:]),
                "by_mpi": tuning.is_slowed_down(),
                "seconds": slowest.tolist(),
            }
            write_whole(self._path, json.dumps(found).encode())


def from_environment(environ: Mapping[str, str] = os.environ) -> StepTimes | None:
    """Where the variable asks for it."""
    path = environ.get(VARIABLE)
    return StepTimes(Path(path)) if path else None


def read(path: Path) -> dict[str, Any]:
    """What a run wrote; nothing where it wrote none."""
    return json.loads(path.read_text()) if path.exists() else {}


def seconds_of_steps(path: Path, warm_up: int) -> list[float]:
    """Seconds of each step, on its slowest rank, after the first `warm_up` of a run, from the file that it wrote."""
    return read(path)["seconds"][warm_up:]

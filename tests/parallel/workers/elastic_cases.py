"""A recipe as it is, whose workers kill themselves at set moments, or wait for another.

    elastic_cases.py <recipe> [its options]

Environment: KILL, `size:rank:step,…`: of that many workers this rank dies in the step after this one; STICK: the same,
and it hangs there; HOLD, `size:step`: so many workers wait there until they hear of other hosts; ONCE: a file that
lets nobody die once it is there, as it is after the first death; MISMATCH: a step after which ranks average arrays of
different shapes; STOP: a step after which rank 0 asks to stop; LEAVE, `size:rank`: of that many this rank dies as it
leaves the run; PACE: seconds that a step takes at least; STEP: a file for rank 0's step.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np

from toolkit import datasets
from toolkit.run import Run

ONCE = Path(os.environ.get("ONCE", "/nowhere"))
KILL, HOLD, STICK = (os.environ.get(name, "").split(",") for name in ("KILL", "HOLD", "STICK"))
MISMATCH, STOP = (int(os.environ.get(name, "-1")) for name in ("MISMATCH", "STOP"))
PACE, STEP = float(os.environ.get("PACE", "0")), os.environ.get("STEP")
log, leave = Run.log, Run.__exit__


def log_or_die(self, **arguments):
    size, rank, step = self.world.size, self.world.rank, self.step
    if f"{size}:{rank}:{step}" in KILL and not ONCE.exists():
        if "ONCE" in os.environ:
            ONCE.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if f"{size}:{rank}:{step}" in STICK:
        time.sleep(600)
    if f"{size}:{step}" in HOLD and rank == 0:
        self._membership.hosts_changed.wait(120)
    if step == STOP and rank == 0:
        self.stop()
    if step == MISMATCH:
        self.adapter.average({"loss": np.zeros(1 + rank)})
    if STEP and rank == 0:
        Path(STEP).write_text(f"{step:09}")
    time.sleep(PACE)
    log(self, **arguments)


def leave_or_die(self, *arguments):
    if f"{self.world.size}:{self.world.rank}" == os.environ.get("LEAVE"):
        os.kill(os.getpid(), signal.SIGKILL)
    return leave(self, *arguments)


datasets.diabetes()  # loads what is slow to load before a short --stall-timeout counts
Run.log, Run.__exit__ = log_or_die, leave_or_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

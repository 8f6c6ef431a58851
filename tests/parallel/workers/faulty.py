"""A recipe, one rank of which comes to harm: `faulty.py FAULT RANK MOMENT recipe.py …`; other ranks run it as it is.

FAULT: raise, kill, stop (SIGSTOP), sleep, exit (sys.exit() with 0), exit3, leave (stop(), and no end).
MOMENT: start, first (collective), step, data, evaluation, checkpoint, writing (a step while a slow disk writes one).
"""

import os
import runpy
import signal
import sys
import threading
import time

from toolkit import checkpoint, datasets, world
from toolkit.run import Run

fault, rank, moment, recipe = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
mine = world.from_launcher().rank == rank
STEP = 17  # within an epoch of 7 steps


def harm():
    print(f"FAULT {time.time()}", file=sys.stderr, flush=True)
    if fault == "raise":
        raise OSError("the disk of this rank is gone")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "sleep":
        time.sleep(600)
    if fault == "leave":
        running.adapter.stop()
        time.sleep(600)
    sys.exit(3 if fault == "exit3" else 0)


running, writing = None, threading.Event()


def before(owner, name, due):
    """Come to harm before a function does its work, where it is due."""
    original = getattr(owner, name)

    def harmed(*arguments, **options):
        global running
        if arguments and isinstance(arguments[0], Run):
            running = arguments[0]
        if mine and due():
            harm()
        return original(*arguments, **options)

    setattr(owner, name, harmed)


def step_is_due():
    return running is not None and running.step >= STEP


if moment == "start" and mine:
    harm()
before(Run, "__enter__", lambda: moment == "first")
before(Run, "log", lambda: moment == "step" and step_is_due())
before(Run, "end_epoch", lambda: moment == "evaluation" and step_is_due())
before(datasets, "with_noise", lambda: moment == "data" and step_is_due())
before(checkpoint if rank == 0 else Run, "flush" if rank == 0 else "save", lambda: moment == "checkpoint")
before(Run, "log", lambda: moment == "writing" and writing.is_set())
if moment == "writing":
    before(checkpoint, "flush", lambda: writing.set() or time.sleep(60))
datasets.diabetes()  # loads what is slow to load before a short --stall-timeout counts
sys.argv = [recipe, *sys.argv[5:]]
runpy.run_path(recipe, run_name="__main__")

"""Rank 1 is stopped for a part of Horovod's cycle; then all are idle: do threads beside the main one want a core?"""

import json
import os
import signal
import time
from pathlib import Path

import torch

import toolkit.adapters.torch as dp

STOPPED = 0.04  # seconds; the cycle, where MPI adds up, is 0.05
IDLE = 1.5  # seconds


def wanted() -> float:
    """Seconds in which another thread than the main one ran, or waited for a core."""
    threads = Path("/proc/self/task").iterdir()
    spent = [file.read_text().split()[:2] for t in threads if t.name != str(os.getpid()) for file in [t / "schedstat"]]
    return sum(int(run) + int(waited) for run, waited in spent) / 1e9


world = dp.start()
model = torch.nn.Linear(10, 1)
optimizer = dp.distribute(torch.optim.SGD(model.parameters(), 0.01), model, reducer="mpi")
dp.broadcast_state(model, optimizer)
model(torch.ones(2, 10)).sum().backward()
optimizer.step()
shares = []
for _ in range(4):
    pids = dp.gather(os.getpid())
    if world.rank == 0:
        os.kill(pids[1], signal.SIGSTOP)
        time.sleep(STOPPED)
        os.kill(pids[1], signal.SIGCONT)
    dp.gather(0)
    time.sleep(0.2)  # the next meeting is over
    before, began = wanted(), time.perf_counter()
    time.sleep(IDLE)
    shares.append((wanted() - before) / (time.perf_counter() - began))
found = dp.gather(shares)
if world.rank == 0:
    print("FOUND", json.dumps(found))
dp.stop()

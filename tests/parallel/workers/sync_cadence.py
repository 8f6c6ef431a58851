"""Two ranks, one of which takes 200 ms for its digests beside steps of 1 ms: both must check as rarely."""

import time
import types

import torch

import toolkit.adapters.torch as dp
from toolkit.sync import SyncCheck

world = dp.start()
model = torch.nn.Linear(2, 1)


def slow_digest(model, optimizer):
    time.sleep(0.2 * world.rank)
    return dp.digest(model, optimizer)


check = SyncCheck(types.SimpleNamespace(digest=slow_digest, average=dp.average), every=None)
check.compare(model, None, 0)
checked = []
for step in range(1, 2001):
    time.sleep(0.001 if step < 200 else 0)
    if check.due(step):
        check.compare(model, None, step)
        checked.append(step)
found = dp.gather(checked)
assert found[0] == found[1], "ranks that decide differently would wait for each other"
if world.rank == 0:
    print("checked", *checked)
dp.stop()

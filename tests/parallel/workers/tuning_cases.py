"""Each rank tells how it was tuned, and how many seconds 5 all-reduces of Horovod one after the other took it."""

import json
import os
import time

import horovod.torch as hvd
import torch

import toolkit.adapters.torch as dp
from toolkit import tuned
from toolkit.options import RunOptions, parse

options = parse(RunOptions, __doc__)
world = dp.start(**options.start)
hvd.allreduce(torch.ones(1), name="x")
began = time.monotonic()
for _ in range(5):
    hvd.allreduce(torch.ones(1), name="x")
found = {
    "environment": {name: os.environ[name] for name in tuned.ACCEPTED if name in os.environ},
    "threads": torch.get_num_threads(),
    "cores": sorted(os.sched_getaffinity(0)),
    "seconds": time.monotonic() - began,
}
told = dp.gather(found)
if world.rank == 0:
    print(f"\nFOUND {json.dumps(told)}", flush=True)
dp.stop()

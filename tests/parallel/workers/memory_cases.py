"""What the adapters take beside the framework: memory_cases.py FRAMEWORK LIMIT; the backend is the environment's.

LIMIT: megabytes that the peak of memory may grow by for each that is broadcast. Afterwards next to nothing is kept.
"""

import importlib
import os
import sys
from pathlib import Path

FRAMEWORK, LIMIT = sys.argv[1], float(sys.argv[2])
BACKEND = os.environ["KERAS_BACKEND"]
dp = importlib.import_module(f"toolkit.adapters.{FRAMEWORK}")
MEGABYTES = 64  # of parameters


def memory(kind: str) -> float:
    """In megabytes: VmHWM is the peak so far, VmRSS what is held now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024


world = dp.start()
if FRAMEWORK == "torch":
    import torch

    model = torch.nn.Linear(4096, MEGABYTES * 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
else:
    import keras

    model = keras.Sequential([keras.Input((4096,)), keras.layers.Dense(MEGABYTES * 64)])
    optimizer = keras.optimizers.SGD()
optimizer = dp.distribute(optimizer, model)
before = {kind: memory(kind) for kind in ("VmHWM", "VmRSS")}
dp.broadcast_state(model, optimizer)
grown, kept = ((memory(kind) - value) / MEGABYTES for kind, value in before.items())
print(f"rank {world.rank}: broadcasting took {grown:.2f} times the {MEGABYTES} MB, and keeps {kept:.2f}", flush=True)
assert grown < LIMIT and kept < 0.2, f"{grown:.2f} times, {LIMIT} allowed; {kept:.2f} kept, 0.2 allowed"
digests = dp.gather(dp.digest(model))
assert all(digest == digests[0] for digest in digests)
dp.describe(model)
other = {"torch": "tensorflow", "tensorflow": "torch"}[BACKEND]
assert other not in sys.modules, f"{other} was imported beside {BACKEND}"
dp.stop()

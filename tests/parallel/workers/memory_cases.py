"""What the adapters take beside the framework: memory_cases.py FRAMEWORK; the backend is the environment's."""

import importlib
import sys
from pathlib import Path

import keras

FRAMEWORK = sys.argv[1]
dp = importlib.import_module(f"toolkit.adapters.{FRAMEWORK}")
MEGABYTES = 64  # of parameters


def peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


world = dp.start()
model = keras.Sequential([keras.Input((4096,)), keras.layers.Dense(MEGABYTES * 64)])
optimizer = dp.distribute(keras.optimizers.SGD(), model)
before = peak()
dp.broadcast_state(model, optimizer)
grown = peak() - before
assert grown < 5 * MEGABYTES, f"broadcasting {MEGABYTES} MB took {grown:.0f} MB"
digests = dp.gather(dp.digest(model))
assert all(digest == digests[0] for digest in digests)
dp.describe(model)
other = {"torch": "tensorflow", "tensorflow": "torch"}[keras.backend.backend()]
assert other not in sys.modules, f"{other} was imported beside {keras.backend.backend()}"
dp.stop()

"""A rank of `compression.py`: trains by each scheme in turns, and rank 0 writes what was measured to FILE.

    compression_worker.py FILE ROUNDS STEPS WIDTH [WIDTH …]

A turn is STEPS steps, and the widths are those of the layers. With `-v`, `start` and each scheme say what they do.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import toolkit.adapters.torch as dp
from toolkit import compression
from toolkit.compression import cost

BATCH = 16
SUMS = 5  # that tell a link's rate


def bytes_sent():
    """Bytes that have left this host by the interface to the others, headers and what was sent again included."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("eth0:")).split(":")[1].split()[8])


class Trainee:
    """A model of its own under one scheme; with none of them ("alone") nothing is averaged."""

    def __init__(self, scheme, widths, world):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)]
        self.model = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.ReLU())][:-1])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        if scheme != "alone":  # the same reducer for all: by MPI, which is the quicker one between hosts
            self.optimizer = dp.distribute(self.optimizer, self.model, compression=scheme, reducer="mpi")
        generator = torch.Generator().manual_seed(world.rank)
        self.x = torch.randn(BATCH, widths[0], generator=generator)
        self.y = torch.randint(widths[-1], (BATCH,), generator=generator)

    def step(self):
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()


def turn(trainee, steps):
    """Seconds and bytes of a step: the slowest rank's, and the mean over the ranks."""
    dp.gather(None)
    before, began = bytes_sent(), time.perf_counter()
    for _ in range(steps):
        trainee.step()
    seconds = time.perf_counter() - began
    dp.gather(None)  # what is still on its way arrives
    found = dp.gather((seconds, bytes_sent() - before))
    return max(pair[0] for pair in found) / steps, statistics.mean(pair[1] for pair in found) / steps


def bits_per_second(length):
    """Of each of two ranks in a plain sum of so many values, as `hvdkit plan` measures a link; the median."""
    from mpi4py import MPI

    values, took = np.ones(length, np.float32), []
    for _ in range(SUMS):
        dp.gather(None)
        began = time.perf_counter()
        MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, values)
        took.append(time.perf_counter() - began)
    return 8 * values.nbytes / statistics.median(took)


def main(file, rounds, steps, *widths):
    world = dp.start(verbose=True)
    names = ["alone", *compression.NAMES]
    trainees = {name: Trainee(name, widths, world) for name in names}
    for trainee in trainees.values():  # which makes connections, buffers and the line of `-v`
        trainee.step()
    shapes = [tuple(p.shape) for p in trainees["none"].model.parameters()]
    parameters = sum(map(math.prod, shapes))
    rate = bits_per_second(parameters)
    dp.gather(None)
    costs = cost.measure(compression.NAMES, shapes, world.size)
    turns = {name: [] for name in names}
    for _ in range(rounds):
        for name, trainee in trainees.items():
            turns[name].append(turn(trainee, steps))
    if world.rank == 0:
        found = {
            "bits_per_second": rate,
            "parameters": parameters,
            "arithmetic_seconds": {c.name: c.seconds for c in costs},
            "bytes_said": {c.name: c.bytes_sent for c in costs},
            "seconds_per_step": {name: [seconds for seconds, _ in taken] for name, taken in turns.items()},
            "bytes_counted": {name: [sent for _, sent in taken] for name, taken in turns.items()},
        }
        Path(file).write_text(json.dumps(found))
    dp.stop()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

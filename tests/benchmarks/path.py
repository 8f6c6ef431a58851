"""Where a step's time goes on 2 workers: computing, waiting for the slower one, negotiating, adding up, and the rest.

    python -m tests.benchmarks.path                          # make bench BENCH=path: writes results/path.md
    python -m tests.benchmarks.path --short                  # one model of torch's; writes nothing

In one process on each rank two copies of a model take turns: one trains by itself, the other is distributed. What the
first takes is computing. Ranks note on one clock when they come to the sum and when they leave it: waiting is until the
last one has come, and adding up is from then on. Horovod's thread also negotiates there; how long is told by what it
takes longer than MPI's sum of as many numbers. The rest is Python, copies, and what the two disturb each other.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks import turns
from tests.benchmarks.models import MODELS, RATE
from tests.launching import launch

RESULTS = Path(__file__).parent / "results" / "path.md"
CONTESTANTS = Path(__file__).parent / "contestants"
MODEL_NAMES, FRAMEWORKS, REDUCERS = ("linear", "cnn", "mlp", "mlp25m"), ("torch", "tensorflow"), ("mpi", "horovod")
RANKS, ROUNDS, STEPS, STARTS = 2, 6, 40, 3


class Clock:
    """When this rank came to the sums of a step, and when it had left the last one; Linux has one clock for all."""

    came = left = None

    def comes(self):
        if self.came is None:
            self.came = time.monotonic()

    def leaves(self):
        self.left = time.monotonic()

    def around(self, function, first=True, last=True):
        """The function, timed: where `first`, a rank comes with its call; where `last`, it leaves with its return."""

        def timed(*arguments, **named):
            if first:
                self.comes()
            found = function(*arguments, **named)
            if last:
                self.leaves()
            return found

        return timed


def torch_steps(dp, reducer):
    """A step of the copy that trains by itself, and one of the distributed copy."""
    import torch_common as common

    def step_of(distributed):
        model = common.build()
        optimizer = common.optimizer(model)
        if distributed:
            optimizer = dp.distribute(optimizer, model, reducer=reducer)

        def step(x, y):
            optimizer.zero_grad()
            common.loss_of(model(x), y).backward()
            optimizer.step()

        return step

    return step_of(False), step_of(True), common.batches


def tensorflow_steps(dp, reducer):
    """A step of the copy that trains by itself, and one of the distributed copy."""
    import keras
    import tensorflow as tf
    import tensorflow_common as common

    def step_of(distributed):
        model, loss_of, optimizer = common.build(), common.loss(), keras.optimizers.SGD(RATE)
        if distributed:
            optimizer = dp.distribute(optimizer, model, reducer=reducer)

        @tf.function(reduce_retracing=True)
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        return step

    return step_of(False), step_of(True), common.batches


def work(framework, reducer):
    """A rank: measures, and rank 0 prints the milliseconds of a step's parts."""
    import importlib

    from toolkit.adapters import _mpi

    sys.path.insert(0, str(CONTESTANTS))
    dp = importlib.import_module(f"toolkit.adapters.{framework}")
    world, clock = dp.start(), Clock()
    alone, distributed, batches = (torch_steps if framework == "torch" else tensorflow_steps)(dp, reducer)
    data = batches(world.rank)
    for step in (alone, distributed):
        for x, y in data[:4]:
            step(x, y)
    _mpi.MpiWire.sum = clock.around(_mpi.MpiWire.sum)
    if framework == "torch":
        import horovod.torch as hvd

        hvd.allreduce_async_ = clock.around(hvd.allreduce_async_, last=False)
        hvd.synchronize = clock.around(hvd.synchronize, first=False)
    rows = []
    for _ in range(ROUNDS):
        bare, own = [], []
        for step, took in ((alone, bare), (distributed, own)):
            dp.gather(None)
            for i in range(STEPS):
                clock.came = clock.left = None
                began = time.monotonic()
                step(*data[i % len(data)])
                took.append((time.monotonic() - began, clock.came or np.nan, clock.left or np.nan))
        rows.append((bare, own))
    found = np.array(dp.gather(rows))  # rank, round, copy, step, (seconds, came, left)
    if world.rank == 0:
        seconds, came, left = np.moveaxis(found, -1, 0)
        last = came.max(axis=0)
        parts = {
            "step": seconds[:, :, 1],
            "computing": seconds[:, :, 0],
            "waiting": (last - came)[:, :, 1],
            "adding up": (left - last)[:, :, 1],
        }
        print("PARTS", json.dumps({name: float(1e3 * np.median(values)) for name, values in parts.items()}))
    dp.stop()


def measured(framework, reducer, model, directory):
    """Milliseconds of a step's parts, medians over some starts."""
    environment = {
        "TMPDIR": str(directory),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        turns.MODEL: model,
        turns.THREADS: "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    starts = []
    for _ in range(STARTS):
        done = launch(RANKS, ["-m", "tests.benchmarks.path", "--rank", framework, reducer], environment=environment)
        if done.returncode:
            raise SystemExit(f"{framework}, {reducer}, {model} failed:\n{done.stderr[-3000:]}")
        starts.append(json.loads(done.stdout.split("PARTS ")[1].splitlines()[0]))
    middle = {name: statistics.median(start[name] for start in starts) for name in starts[0]}
    return middle | {"worst": max(start["step"] for start in starts)}


def table(cases, directory):
    """As markdown; each row is printed when it is there."""
    head = ["", "model", "by", "step (slowest start)", "computing", "waiting", "negotiating", "adding up", "the rest"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    sums = {}
    for framework, model, reducer in cases:
        found = measured(framework, reducer, model, directory)
        known = not np.isnan(found["waiting"])  # Horovod's operations in a graph have no place for a clock
        if reducer == "mpi":
            sums[framework, model] = found["adding up"]
        adding = min(found["adding up"], sums[framework, model]) if known else np.nan
        negotiating = found["adding up"] - adding
        rest = found["step"] - found["computing"]
        rest -= found["waiting"] + found["adding up"] if known else 0
        numbers = [found["computing"], found["waiting"], negotiating, adding, rest]
        cells = ["in the rest" if np.isnan(number) else f"{number:.3g}" for number in numbers]
        step = f"{found['step']:.3g} ({found['worst']:.3g})"
        lines.append("| " + " | ".join([framework, MODELS[model].title, reducer, step, *cells]) + " |")
        print(lines[-1], flush=True)
    return lines


TEXT = """# Where a step's time goes

Written by `make bench BENCH=path`: {ranks} workers on {cores} cores that others use too, one compute thread each, 64
samples a worker, plain SGD. Milliseconds, medians of {steps} steps in each of {starts} starts, and of the starts.

{table}

Computing is the same loop with nothing distributed, in the same processes, in turns. Waiting is until the slower
worker has come to the sum. Negotiating is what Horovod takes from then on beyond MPI's sum. The rest is Python, copies
into one array and back, and what the workers and Horovod's thread disturb each other's computing; below zero it is
noise.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one model of torch's; nothing is written")
    parser.add_argument("--rank", nargs=2, metavar=("FRAMEWORK", "REDUCER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        work(*options.rank)
        return
    cases = [(f, m, r) for f in FRAMEWORKS for m in MODEL_NAMES for r in REDUCERS]
    with tempfile.TemporaryDirectory(prefix="path-") as directory:
        lines = table(cases[:2] if options.short else cases, Path(directory))
    if not options.short:
        from toolkit.tuning import usable_cores

        steps = ROUNDS * STEPS
        text = TEXT.format(ranks=RANKS, cores=usable_cores(), steps=steps, starts=STARTS, table="\n".join(lines))
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()

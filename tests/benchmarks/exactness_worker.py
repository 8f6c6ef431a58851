"""One rank of `exactness.py`: trains a recipe's CNN and prints what it measured as JSON."""

import importlib
import itertools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit import datasets
from toolkit.run import Run

sys.path.append(str(Path(__file__).parents[2] / "recipes"))
FRAMEWORK, WHAT, PAIRS, STEPS = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
recipe = importlib.import_module(f"cnn_{FRAMEWORK}")
dp = recipe.dp


@dataclass(frozen=True)
class Options(recipe.Options):
    """The recipe's, for a run whose checkpoints and checks are this script's."""

    epochs: int = 10**6
    checkpoint_every: int = 10**6
    print_every: int = 10**6
    check_sync: int = 0
    deterministic: bool = "--deterministic" in sys.argv


def torch_step(model, optimizer):
    def step(batch):
        optimizer.zero_grad()
        loss = recipe.cross_entropy(model(batch.x), batch.y) * batch.weight
        loss.backward()
        optimizer.step()
        return loss

    return step


def tensorflow_step(model, optimizer):
    import tensorflow as tf

    @tf.function(reduce_retracing=True)
    def train_step(x, y, weight):
        with tf.GradientTape() as tape:
            loss = recipe.cross_entropy(y, model(x, training=True)) * weight
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return lambda batch: train_step(batch.x, batch.y, tf.constant(batch.weight, tf.float32))


def build():
    if FRAMEWORK == "torch":
        import torch

        if WHAT == "memory":  # large beside everything else in the process
            model = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.Linear(4096, 2048))
        else:
            model = recipe.CNN(0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        return model, dp.distribute(optimizer, model), torch_step
    model = recipe.build_model(0.0)
    optimizer = recipe.tf.keras.optimizers.SGD(0.01, momentum=0.9)
    return model, dp.distribute(optimizer, model), tensorflow_step


def endless(run, data):
    for _ in run.epochs():
        yield from run.tensors(data, lambda batch: recipe.inputs(batch.x))
        run.end_epoch()


def seconds(run, step, batches, count, save=False):
    """Wall time of `count` steps, with a checkpoint after each 100, the last of which is waited for."""
    dp.gather(None)
    began = time.perf_counter()
    for i, batch in enumerate(itertools.islice(batches, count), 1):
        run.log(loss=step(batch))
        if save and i % 100 == 0:
            run.save()
    run._writer.wait()
    dp.gather(None)
    return time.perf_counter() - began


def timed(function, times):
    """Milliseconds of each of some calls, which all ranks begin together."""
    found = []
    for _ in range(times):
        dp.gather(None)
        began = time.perf_counter()
        function()
        found.append(1000 * (time.perf_counter() - began))
    return found


def costs(run, step, batches):
    seconds(run, step, batches, 100)  # warm
    pairs = [(seconds(run, step, batches, STEPS), seconds(run, step, batches, STEPS, save=True)) for _ in range(PAIRS)]
    per_step = [1000 * plain / STEPS for plain, _ in pairs]
    checks = timed(run.check_sync, 50)
    saves = []
    for _ in range(10):
        seconds(run, step, batches, 1)
        saves += timed(run.save, 1)
        run._writer.wait()
    return {
        "milliseconds_per_step": per_step,
        "checkpoint_percent": [100 * (saving / plain - 1) for plain, saving in pairs],
        "checkpoint_milliseconds": saves,
        "check_milliseconds": checks,
        "check_percent": [100 * check / (100 * float(np.median(per_step))) for check in checks],
    }


def peak_megabytes():
    return (
        int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
        / 1024
    )


def memory(run, model, optimizer):
    import torch

    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the momentum
    state = sum(array.nbytes for array in dp.export_state(model, optimizer).values()) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_megabytes()
    run.save()
    run._writer.wait()
    return {"state_megabytes": state, "extra_copies": (peak_megabytes() - before) / state}


def main():
    options = Options()
    world = dp.start(**options.start)
    train, _ = datasets.digits()
    model, optimizer, make_step = build()
    with tempfile.TemporaryDirectory() as directory:
        options = Options(output=Path(directory) / str(world.rank))
        with Run(options, world, dp, model, optimizer, len(train)) as run:
            step, batches = make_step(model, optimizer), endless(run, train)
            if WHAT == "memory":
                found = memory(run, model, optimizer)
            elif WHAT == "steps":
                seconds(run, step, batches, 50)
                found = [seconds(run, step, batches, STEPS) / STEPS for _ in range(PAIRS)]
            else:
                found = costs(run, step, batches)
    if world.rank == 0:
        print("\nfigures " + json.dumps(found), flush=True)
    dp.stop()


main()

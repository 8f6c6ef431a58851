"""Samples a second of `Run.batches`, against torch's DataLoader over a TensorDataset on the same arrays.

    python -m tests.benchmarks.input                 # make bench BENCH=input: writes results/input.md; some minutes
    python -m tests.benchmarks.input --short         # a look at whether it runs; writes nothing

One process. In each repetition every way reads the same number of batches in shuffled order, one way after the other;
a ratio is that of one repetition. The time counts that the loop waits for batches, not what it does between them.
"with a step" puts 5 ms between batches, in which the cores are idle as while an accelerator computes. "not in memory"
empties the file from the kernel's cache before each reading, and reads another part of it each time.
"""

import argparse
import contextlib
import functools
import io
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import toolkit.adapters.torch as dp
from toolkit import npy
from toolkit.datasets import Split
from toolkit.options import RunOptions
from toolkit.run import Run
from toolkit.tuning import usable_cores

RESULTS = Path(__file__).parent / "results" / "input.md"
WAYS = ("batches", "DataLoader", "DataLoader, 2 workers")
STEP_SECONDS = 0.005
LEAST = 5.0  # the target: times a DataLoader without workers


@dataclass(frozen=True)
class Case:
    """What is read: arrays of `samples` rows of this shape, `steps` batches of them each time."""

    name: str
    shape: tuple[int, ...]
    samples: int
    batch: int
    steps: int
    file: bool = False
    cold: bool = False
    step: bool = False


CASES = (
    Case("28 x 28, batch 32", (28, 28), 60_000, 32, 1000),
    Case("28 x 28, batch 256", (28, 28), 60_000, 256, 200),
    Case("3 x 224 x 224, batch 32", (3, 224, 224), 640, 32, 20),
    Case("3 x 224 x 224, batch 128", (3, 224, 224), 640, 128, 5),
    Case("3 x 224 x 224, batch 32, with a step", (3, 224, 224), 640, 32, 20, step=True),
    Case("28 x 28, batch 32, mapped", (28, 28), 60_000, 32, 1000, file=True),
    Case("28 x 28, batch 64, mapped, not in memory", (28, 28), 200_000, 64, 20, file=True, cold=True),
    Case("3 x 224 x 224, batch 32, mapped, not in memory", (3, 224, 224), 1280, 32, 10, file=True, cold=True),
)


def arrays(case, directory):
    """x and y of the case; x mapped where it is to be a file."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, 10, case.samples)
    if not case.file:
        return generator.random((case.samples, *case.shape), np.float32), y
    path = directory / f"{'x'.join(map(str, case.shape))}-{case.samples}.npy"
    if not path.exists():
        x = np.lib.format.open_memmap(path, "w+", np.float32, (case.samples, *case.shape))
        for begin in range(0, case.samples, 256):
            x[begin : begin + 256] = generator.random(x[begin : begin + 256].shape, np.float32)
        x.flush()
    return npy.mapped(path), y


def forget(path):
    """Empty a file from the kernel's cache, as far as nobody has it mapped."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(opened)


def of_run(run, data):
    """An epoch's batches of a run, as tensors."""
    for batch in run.batches(data):
        yield torch.from_numpy(batch.x), torch.from_numpy(batch.y)


def of_loader(case, data, workers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a mapped file is not writable
        dataset = TensorDataset(torch.from_numpy(data.x), torch.from_numpy(data.y))
    yield from DataLoader(dataset, case.batch, shuffle=True, num_workers=workers)


def samples_per_second(case, batches, log):
    """Of an epoch's first `case.steps` batches, with what the pipeline does to begin."""
    waited = samples = 0.0
    for _ in range(case.steps):
        began = time.perf_counter()
        x, _ = next(batches)
        waited += time.perf_counter() - began
        samples += len(x)
        del x
        log()
        if case.step:
            time.sleep(STEP_SECONDS)
    return samples / waited


def measure(case, repetitions, directory, world):
    """Samples a second in each way, a list of all repetitions."""
    data = Split(*arrays(case, directory))
    found = {way: [] for way in WAYS}
    for _ in range(repetitions + 1):
        for way in WAYS:
            with contextlib.ExitStack() as stack:
                if case.cold:
                    path = data.x.filename
                    del data
                    forget(path)
                    data = Split(*arrays(case, directory))
                if way == "batches":
                    run = stack.enter_context(new_run(case, directory, world))
                    batches, log = of_run(run, data), functools.partial(run.log, loss=torch.tensor(0.5))
                else:
                    batches, log = of_loader(case, data, 2 if "workers" in way else 0), lambda: None
                stack.enter_context(contextlib.closing(batches))
                found[way].append(samples_per_second(case, batches, log))
            del batches
    return {way: values[1:] for way, values in found.items()}  # the first warms up


def new_run(case, directory, world):
    model = torch.nn.Linear(1, 1)
    optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.1), model)
    often = 10**6
    output = Path(tempfile.mkdtemp(dir=directory)) / "run"
    seed = int.from_bytes(os.urandom(3), "big")  # other parts of the file than the last reading
    options = RunOptions(
        epochs=often, global_batch_size=case.batch, checkpoint_every=often, print_every=often, output=output, seed=seed
    )
    return Run(options, world, dp, model, optimizer, case.samples)


def summary(figures):
    """Median, least and most samples a second of each way, and of the ratio to each DataLoader."""

    def of(values):
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    ours = figures["batches"]
    ratios = {f"to {way}": [a / b for a, b in zip(ours, figures[way], strict=True)] for way in WAYS[1:]}
    return {name: of(values) for name, values in {**figures, **ratios}.items()}


def table(results):
    """A row a case: medians of samples a second, and ratios with their least and most."""
    lines = ["| what | " + " | ".join(f"{way}, samples/s" for way in WAYS) + " | ratio to 0 workers | to 2 |"]
    lines.append("|---" * 6 + "|")
    for name, found in results.items():
        cells = [f"{found[way]['median']:,.0f}" for way in WAYS]
        for way in WAYS[1:]:
            ratio = found[f"to {way}"]
            cells.append(f"{ratio['median']:.1f} ({ratio['min']:.1f} … {ratio['max']:.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(repetitions=7, cases=CASES):
    """Everything measured: case to way to median, min and max."""
    world = dp.start(seed=0)
    try:
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            return {case.name: summary(measure(case, repetitions, Path(directory), world)) for case in cases}
    finally:
        dp.stop()


TEXT = """# Batches a second

Written by `make bench BENCH=input`: `Run.batches` against torch's DataLoader over a TensorDataset on the same arrays,
in one process, medians of {repetitions} repetitions in turns; ratios are of one repetition each, with the least and the
most. On {cores} cores that others use too. The target, {least:g} times a DataLoader without workers or more, is for
batches of small samples: where a sample is an image of 0.6 MB, copying it is what takes the time, in every way.

{table}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one repetition; nothing is written")
    short = parser.parse_args().short
    repetitions = 1 if short else 7
    lines = table(figures(repetitions))
    print(lines)
    if not short:
        cores = usable_cores()
        RESULTS.write_text(TEXT.format(repetitions=repetitions, cores=cores, least=LEAST, table=lines))


if __name__ == "__main__":
    main()

"""python -m tests.gpu.overhead: what the toolkit's step costs beside the same step bare; exits with 1 above a limit.

Two copies of a model are trained in turn in one process, on a GPU, or without one on the CPU a small one: by the
framework alone, and with the toolkit's `distribute` and the look at each step that `Run` has (is a gradient not
finite?). Prints both medians of a step, their ratio, and on a GPU the most memory that each takes.

With one worker time and memory have limits; with several (`mpirun -np 2 python -m tests.gpu.overhead --share-gpus`) the
memory alone, as gradients travel then. Workers that share a GPU, or are on CPUs, send torch's in buckets too, as those
with GPUs of their own do, but through the host's memory in NCCL's place.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import statistics
import sys
import time
from typing import Any

import numpy as np

from toolkit.adapters import _job

MOST_TIME = 1.02  # of a bare step's, on a GPU with one worker
FUSION = int(os.environ.get("HOROVOD_FUSION_THRESHOLD", 128 * 2**20))  # bytes of Horovod's own buffer


def most_bytes(framework: str, workers: int, gradients: int) -> int:
    """The most that the toolkit may take of a GPU's memory beside the bare loop.

    One worker's gradients are used where they are; only a graph of TensorFlow's, which could use up each as it comes,
    keeps all of them until they are known to be finite. Those of several travel in memory of their own, as large.
    """
    if workers > 1:
        return gradients + gradients // 100 + FUSION
    return gradients // 100 + (0 if framework == "torch" else gradients)


def problems(ratio: float, most_time: float | None, extra: int | None, most_extra: int) -> list[str]:
    """What is above its limit, a line each."""
    found = []
    if most_time is not None and ratio > most_time:
        found.append(f"a step takes {ratio:.4f} times a bare one's time, and at most {most_time} is allowed")
    if extra is not None and extra > most_extra:
        found.append(f"a step takes {extra:,} bytes more than a bare one, and at most {most_extra:,} are allowed")
    return found


def most_taken(trainings: Any, *arguments: Any) -> tuple[Any, int]:
    """A training after some steps, and the most bytes of the GPU that it took, weights and optimizer included."""
    gc.collect()
    before = trainings.allocated()
    trainings.restart_peak()
    training = trainings.Training(*arguments)
    training.take(3)
    trainings.wait()
    return training, trainings.peak() - before


def seconds_per_step(trainings: Any, both: dict[str, Any], rounds: int, steps: int) -> dict[str, float]:
    """The medians of both, measured in turn, the first in turn too: neither has the machine's better times."""
    took: dict[str, list[float]] = {name: [] for name in both}
    for number in range(rounds + 1):
        for name in sorted(both, reverse=number % 2 == 1):
            trainings.wait()
            began = time.perf_counter()
            both[name].take(steps)
            trainings.wait()
            if number:  # the first time is for memory and libraries
                took[name].append((time.perf_counter() - began) / steps)
    return {name: statistics.median(found) for name, found in took.items()}


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", default="torch", choices=("torch", "tensorflow", "keras"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--share-gpus", action="store_true", help="let workers share a GPU")
    parser.add_argument("--rounds", type=int, default=60, help="measurements of each (default: 60)")
    parser.add_argument("--steps", type=int, default=5, help="steps in each (default: 5)")
    parser.add_argument(
        "--most-time",
        type=float,
        help=f"most of a bare step's time (default: {MOST_TIME} on a GPU with one worker, else no limit)",
    )
    return parser.parse_args()


def main() -> int:
    """Measure, print, and return the exit code."""
    options = parse_arguments()
    dp = importlib.import_module(f"toolkit.adapters.{options.framework}")
    trainings = importlib.import_module(f"tests.gpu.training_{options.framework}")
    world = dp.start(device=options.device, share_gpus=options.share_gpus)
    on_gpu = world.device != "cpu"
    if world.size > 1 and "horovod.torch" in sys.modules and not _job.reduces_on_gpu():
        from tests.parallel.workers.carried import carry  # which loads torch

        carry()
    both, taken = {}, {}
    if on_gpu:
        most_taken(trainings, world.device)  # what libraries keep for themselves is there from here on
        for name, *adapter in (("bare",), ("toolkit", dp)):
            both[name], taken[name] = most_taken(trainings, world.device, *adapter)
    else:
        both = {"bare": trainings.Training("cpu"), "toolkit": trainings.Training("cpu", dp)}
    gradients = sum(array.nbytes for array in both["bare"].weights())
    took = seconds_per_step(trainings, both, options.rounds, options.steps)
    ratio, extra = took["toolkit"] / took["bare"], taken["toolkit"] - taken["bare"] if on_gpu else None
    if world.rank == 0:
        print(
            f"{options.framework} on {world.device}, {world.size} worker(s): bare {1000 * took['bare']:.3f} ms a step, "
            f"toolkit {1000 * took['toolkit']:.3f} ms, ratio {ratio:.4f}"
        )
        if extra is not None:
            aim = "missed" if extra > FUSION else "met"
            print(
                f"most memory: bare {taken['bare']:,} bytes, toolkit {extra:+,} (the gradients are {gradients:,}; "
                f"the aim, Horovod's own buffer of {FUSION:,}, is {aim})"
            )
    most_time = MOST_TIME if options.most_time is None and on_gpu and world.size == 1 else options.most_time
    found = problems(ratio, most_time, extra, most_bytes(options.framework, world.size, gradients))
    # A GPU's additions have no fixed order, and those of more than two workers another one than one's.
    pairs = zip(*(training.weights() for training in both.values()), strict=True)
    if not on_gpu and world.size <= 2 and not all(np.array_equal(p, q) for p, q in pairs):
        found.append("the two were not trained alike")
    dp.stop()
    for line in found:
        print(f"✗ rank {world.rank}: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

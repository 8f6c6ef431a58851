"""How many images or tokens a second a job trains on, with the spread, as Horovod's synthetic benchmarks tell it."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import checkpoint, output, watch
from toolkit.adapters import Adapter
from toolkit.errors import RunFailed, UsageError
from toolkit.files import write_whole
from toolkit.progress import say
from toolkit.sync import SyncCheck
from toolkit.synthetic import SyntheticOptions, Workload
from toolkit.world import World

_CONFIDENCE = 1.96  # standard deviations to each side, which hold 95 % of a normal distribution


def measure(
    step: Callable[[], Any],
    model: Any,
    optimizer: Any,
    *,
    options: SyntheticOptions,
    world: World,
    adapter: Adapter,
    work: Workload,
) -> dict[str, Any]:
    """Warm up, time the iterations, look that all ranks hold the same model, and have rank 0 tell what was found.

    Args:
        step: takes one training step and returns its loss, a number or a scalar tensor. `float` of it, which waits for
            the device, is taken once an iteration, so that steps may queue there.
        model: what the step trains.
        optimizer: the distributed optimizer.
        options: the recipe's.
        world: what `start` returned.
        adapter: the adapter in use.
        work: what the step trains on, such as `toolkit.synthetic.workload` gives.

    Returns:
        What `--json` holds: the settings, `workers`, `device`, `unit`; `total`, over all workers, and `per_worker`,
        each with `median`, `mean`, `confidence` (1.96 standard deviations), `minimum` and `maximum` over the
        iterations, in units a second; `rates`, the total in each; `losses`, the first and the last step's mean over
        the ranks; on GPUs `gpu_memory_megabytes`, the largest of the ranks'.

    Raises:
        UsageError: --json can't be written.
        RanksDiffer: the ranks do not hold the same model; on every rank.
        RunFailed: a rank's last loss is not finite; on every rank.
    """
    output.decided_by_rank_0(world, adapter, lambda: _check_file(options.json))
    settings = {**work.settings, "workers": world.size, "device": world.device}
    _say(world, ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()))
    per_iteration = work.per_step * options.num_batches_per_iter  # of one worker

    def tell(number: int, seconds: float) -> None:
        rate = per_iteration / seconds
        _say(world, f"iteration {number}/{options.num_iters}: {rate:,.1f} {work.unit}/s per worker")

    losses, seconds = _timed(step, options, tell)
    told = adapter.gather((losses, seconds, adapter.usage()))
    _check_losses([losses[-1] for losses, _, _ in told])
    steps = options.num_warmup_batches + options.num_iters * options.num_batches_per_iter
    SyncCheck(adapter, 0).compare(model, optimizer, steps)
    rates = world.size * per_iteration / np.max([seconds for _, seconds, _ in told], axis=0)
    memory = [usage["gpu_memory_megabytes"] for *_, usage in told if usage]
    found = {
        **settings,
        "unit": work.unit,
        "total": _spread(rates),
        "per_worker": _spread(rates / world.size),
        "rates": rates.tolist(),
        "losses": np.mean([losses for losses, _, _ in told], axis=0).tolist(),
        **({"gpu_memory_megabytes": max(memory)} if memory else {}),
    }
    for line in _summary(found):
        _say(world, line)
    if world.rank == 0 and options.json is not None:
        _write(options.json, found)
    return found


def _timed(
    step: Callable[[], Any], options: SyntheticOptions, tell: Callable[[int, float], None]
) -> tuple[list[float], list[float]]:
    """The first and the last loss, and each iteration's seconds, which are told as they come."""
    watch.doing("warming up")
    first = last = float(step())
    for _ in range(options.num_warmup_batches - 1):
        last = step()
    float(last)
    watch.doing("measuring")
    seconds = []
    for number in range(1, options.num_iters + 1):
        began = time.perf_counter()
        for _ in range(options.num_batches_per_iter):
            last = step()
        last = float(last)
        seconds.append(time.perf_counter() - began)
        tell(number, seconds[-1])
    return [first, last], seconds


def _check_losses(last: list[float]) -> None:
    broken = [rank for rank, loss in enumerate(last) if not math.isfinite(loss)]
    if broken:
        raise RunFailed(
            f"the last loss on rank {broken[0]} is {last[broken[0]]}, and the time of such steps says nothing: "
            "lower --learning-rate, or take another --precision."
        )


def _spread(rates: np.ndarray) -> dict[str, float]:
    return {
        "median": float(np.median(rates)),
        "mean": float(np.mean(rates)),
        "confidence": float(_CONFIDENCE * np.std(rates)),
        "minimum": float(np.min(rates)),
        "maximum": float(np.max(rates)),
    }


def _summary(found: Mapping[str, Any]) -> list[str]:
    """The last lines: the rates as in Horovod's benchmarks, with median and range; and that it was a training."""
    lines = []
    for name, whose in (("per_worker", "per worker"), ("total", f"on {found['workers']} worker(s)")):
        rate = found[name]
        lines.append(
            f"{found['unit']}/s {whose}: median {rate['median']:,.1f}, mean {rate['mean']:,.1f} "
            f"+- {rate['confidence']:,.1f}, from {rate['minimum']:,.1f} to {rate['maximum']:,.1f}"
        )
    first, last = found["losses"]
    same = "all workers hold the same weights; " if found["workers"] > 1 else ""
    memory = f"; {found['gpu_memory_megabytes']:,.0f} MB of a GPU" if "gpu_memory_megabytes" in found else ""
    return [*lines, f"{same}loss {first:.4g} at first, {last:.4g} at last{memory}"]


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        say(text, sys.stdout)


def _check_file(path: Path | None) -> None:
    """Refuse before the measurement what could not be written after it."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UsageError(f"--json is {str(path)!r}: give the path of a file, in a directory that is there.")


def _write(path: Path, found: Mapping[str, Any]) -> None:
    try:
        write_whole(path, json.dumps(found).encode() + b"\n")
    except OSError as error:
        raise UsageError(f"--json {path} can't be written: {checkpoint.reason(error)}; give another path.") from None

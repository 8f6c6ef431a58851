"""What every adapter does alike, above the framework: checks, packing for collectives, ends of a job."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from toolkit import tuning, world
from toolkit.errors import RanksDiffer, UsageError
from toolkit.tuning import Choices
from toolkit.world import World

COMPRESSIONS = ("none", "fp16")


def seed_python_and_numpy(seed: int) -> None:
    """Seed `random` and numpy's legacy global generator, which users' own data code may use."""
    random.seed(seed)
    np.random.seed(seed)


def start_horovod(hvd: Any, *, tune: bool, verbose: bool) -> tuple[World, Choices]:
    """Tune the environment, start Horovod and make this process's failures end the job.

    Returns:
        The world, and what tuning chose for the framework's threads.

    Raises:
        UsageError: the launcher started more workers than found each other.
    """
    launched = world.from_launcher()
    end_job_on_exception(launched or World())
    if launched is None:  # one worker needs no MPI, which would look for its daemon
        os.environ.setdefault("HOROVOD_CONTROLLER", "gloo")
        os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "gloo")
    choices = tuning.choose_environment() if tune else Choices()
    os.environ.update(choices.environment)
    hvd.init()
    here = world.from_horovod(hvd)
    if launched is not None and launched.size != here.size:
        raise UsageError(
            f"the launcher started {launched.size} workers, but Horovod found {here.size}: "
            "start them with the mpirun or horovodrun of the MPI that Horovod was built with."
        )
    end_job_on_exception(here)
    choices = tuning.with_threads(choices, here.local_size) if tune else choices
    if verbose and here.rank == 0:
        print(choices.explain(), flush=True)
    return here, choices


def require_started(hvd: Any) -> None:
    """Raise `UsageError` where `start()` was not called yet."""
    if not hvd.is_initialized():
        raise UsageError("Horovod is not started: call start() once before any other function of the adapter.")


def check_distribute_options(accumulation_steps: int, clip_norm: float | None, compression: str) -> None:
    """Raise `UsageError` for an option of `distribute` that is out of range."""
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise UsageError(f"accumulation_steps is {accumulation_steps!r}: give a whole number of at least 1.")
    if clip_norm is not None and not 0 < clip_norm < float("inf"):
        raise UsageError(f"clip_norm is {clip_norm!r}: give a positive number, or None for no clipping.")
    if compression not in COMPRESSIONS:
        raise UsageError(f"compression is {compression!r}: give one of {', '.join(COMPRESSIONS)}.")


def end_job_on_exception(here: World) -> None:
    """Make an uncaught exception in this process end the whole job, naming this rank.

    The process leaves without Horovod's and MPI's shutdown, which would wait for the other ranks;
    its exit code makes the launcher end those.
    """

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, UsageError | RanksDiffer):
            if here.rank > 0:
                # What all ranks share is told once: rank 0's exit ends the others in this time.
                time.sleep(5)
            prefix = f"[{here.name}] " if here.rank > 0 else ""
            print(f"{prefix}error: {error}", file=sys.stderr)
            code = 2 if issubclass(kind, UsageError) else 1
        else:
            text = "".join(traceback.format_exception(kind, error, trace))
            if here.size > 1:
                text += f"[{here.name}] this worker failed with the error above, which ends the job.\n"
            sys.stderr.write(text)
            code = 130 if issubclass(kind, KeyboardInterrupt) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    sys.excepthook = excepthook


def weighted_average(
    values: Mapping[str, float | np.ndarray],
    weight: float,
    all_reduce_sum: Callable[[np.ndarray], np.ndarray],
) -> dict[str, float | np.ndarray]:
    """`Adapter.average` on top of one sum of a float64 vector over all ranks."""
    if not 0 <= weight < float("inf"):
        raise UsageError(f"the weight of an average is {weight!r}: give a finite number of at least 0.")
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}
    weighted = [weight * array.ravel() if weight > 0 else np.zeros(array.size) for array in arrays.values()]
    total = all_reduce_sum(np.concatenate([[weight], *weighted]))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = total[1:] / total[0]
    result: dict[str, float | np.ndarray] = {}
    start = 0
    for name, array in arrays.items():
        part = means[start : start + array.size].reshape(array.shape)
        result[name] = float(part) if array.ndim == 0 else part
        start += array.size
    return result


def digest_arrays(state: Mapping[str, np.ndarray]) -> dict[str, str]:
    """16 hexadecimal digits of BLAKE2b over each array's dtype, shape and bytes."""
    digests = {}
    for name, array in state.items():
        hasher = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=8)
        hasher.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        digests[name] = hasher.hexdigest()
    return digests


def check_state_fits(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Raise `UsageError` listing the first differences in names, shapes and dtypes."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in this model" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        have, want = found[name], expected[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(
                f"{name} is {have.dtype}{list(have.shape)} where the model has {want.dtype}{list(want.shape)}"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(
            f"the saved state does not fit this model: {'; '.join(sorted(problems)[:5])}{more}. "
            "Build the model with the options that it was saved with."
        )

"""Settings of this process for this machine, chosen around Horovod's start. Nothing that the user set is changed.

Why they are worth it: a CNN of 21,840 parameters took 15.7 ms a step with 2 workers on 2 cores under
Horovod's own settings, 11.0 ms with these, and 9.2 ms without any communication.

What is left alone, and why:

- OpenMP's variables. The framework has loaded its runtime before `start`, which then reads them no more: of
  OMP_NUM_THREADS, OMP_WAIT_POLICY, OMP_PROC_BIND and GOMP_SPINCOUNT none had an effect on torch once it was imported
  (KMP_BLOCKTIME never has: torch's wheels bring GNU's runtime). The framework's own call for its threads works.
- Threads for independent operations: torch's serve torch.jit.fork alone; TensorFlow's are two at least.
- Cores, fusion threshold, cache and the core of Horovod's thread: what helps one model on one machine hurts another.
  `hvdkit tune` tries the first three on the recipe itself.
- What MPICH has in place of Open MPI's yielding: it was not measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.errors import UsageError

THREADS = "HVDKIT_THREADS"  # compute threads of each worker
AFFINITY = "HVDKIT_AFFINITY"  # 1: each worker of a host has a part of its cores to itself

_YIELD = ("1", "Open MPI otherwise spins on the cores that compute")
_MALLOC = ((-4, 0), (-1, 2**31 - 1))  # M_MMAP_MAX: no block has a mapping of its own; M_TRIM_THRESHOLD: bytes
CYCLE_TIME = "0.2"  # milliseconds between Horovod's looks at its queue
SLOW_CYCLE = "50"  # the same where MPI adds up the gradients


@dataclass(frozen=True)
class Choices:
    """What was decided.

    Attributes:
        threads: compute threads for this process's framework; None leaves the framework's own choice.
        cores: numbers of the logical CPUs to keep this process to; None: those that it has.
        environment: variables to set before MPI and Horovod are initialised.
        reasons: one line for each choice.
    """

    threads: int | None = None
    cores: tuple[int, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    def explain(self) -> str:
        """The choices and their reasons, a line each."""
        return "\n".join(f"tuning: {reason}" for reason in self.reasons) or "tuning: off"


def physical_cores(cpus: Collection[int], root: Path = Path("/")) -> list[tuple[int, ...]]:
    """These logical CPUs core by core, as several may be hardware threads of one (SMT), whose arithmetic they share.

    Where the kernel does not tell, each is a core. Source: its ABI/stable/sysfs-devices-system-cpu,
    thread_siblings_list.

    Args:
        cpus: numbers as the kernel has them.
        root: where /sys is.
    """
    found: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        siblings = str(cpu)
        with contextlib.suppress(OSError):
            siblings = (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        found.setdefault(siblings, []).append(cpu)
    return [tuple(threads) for threads in found.values()]


def usable_cores(root: Path = Path("/")) -> int:
    """The physical cores that this process may use: by its affinity, or fewer where its control groups have a quota."""
    return _within_quota(len(physical_cores(os.sched_getaffinity(0), root)), root)


def host_cores(root: Path = Path("/")) -> int:
    """The physical cores that all workers of this host may use together.

    They are this process's, unless its launcher has bound it to a part of them: then they are the launcher's.
    """
    every = (os.sched_getaffinity(0), _of_launcher(root))
    return _within_quota(max(len(physical_cores(cpus, root)) for cpus in every), root)


def is_bound(root: Path = Path("/")) -> bool:
    """Whether the launcher has bound this process to a part of the CPUs that it has itself."""
    return os.sched_getaffinity(0) < _of_launcher(root)


def _of_launcher(root: Path) -> set[int]:
    """The CPUs of the process that started this one; none where it lives in other control groups than this one."""
    parent = os.getppid()
    with contextlib.suppress(OSError):  # such as one that has ended
        if (root / f"proc/{parent}/cgroup").read_bytes() == (root / "proc/self/cgroup").read_bytes():
            return os.sched_getaffinity(parent)
    return set()


def _within_quota(cores: int, root: Path) -> int:
    """So many cores, or fewer where this process's control groups have a quota of CPU time.

    Containers are given their share of a machine as a quota of CPU time, on all of its cores. Part of a core counts as
    one. Sources: the kernel's admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst.

    Args:
        cores: at least 1.
        root: where /proc and /sys are.
    """
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                groups, read = root / "sys/fs/cgroup", _quota_of_v2
            elif "cpu" in controllers.split(","):
                groups, read = root / "sys/fs/cgroup/cpu", _quota_of_v1
            else:
                continue
            place = groups / group.strip("/")  # in a container it may be what only the host has
            for directory in (place, *place.parents):
                if directory.is_relative_to(groups):
                    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                        cores = min(cores, max(1, math.ceil(read(directory))))
    return cores


def _quota_of_v2(directory: Path) -> float:
    """The group's quota in cores; ValueError: none."""
    quota, period = (directory / "cpu.max").read_text().split()
    return float(quota) / float(period) if quota != "max" else math.nan  # which ceil() refuses with a ValueError


def _quota_of_v1(directory: Path) -> float:
    """The group's quota in cores; ValueError: none."""
    quota = float((directory / "cpu.cfs_quota_us").read_text())
    return quota / float((directory / "cpu.cfs_period_us").read_text()) if quota > 0 else math.nan


def mpi_of(environ: Mapping[str, str] = os.environ) -> str:
    """The MPI that the launcher's variables tell: Open MPI, MPICH (also Intel's), none, or "" where they don't."""
    if environ.get("HOROVOD_CONTROLLER") == "gloo":
        return "none"
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return "Open MPI"
    return "MPICH" if "PMI_RANK" in environ and "MPI_LOCALNRANKS" in environ else ""


def defaults(mpi: str) -> dict[str, tuple[str, str]]:
    """What is set without the user's word: variables to values and reasons."""
    chosen = {"HOROVOD_CYCLE_TIME": (CYCLE_TIME, "milliseconds between Horovod's looks; its own 1 delays small models")}
    return {"OMPI_MCA_mpi_yield_when_idle": _YIELD, **chosen} if mpi in ("Open MPI", "") else chosen


def is_slowed_down(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether Horovod's thread has the cycle that it is given where MPI adds up the gradients."""
    return environ.get("HOROVOD_CYCLE_TIME") == SLOW_CYCLE


def what_is_set(names: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """The first of these variables that is set, in words; empty: none is."""
    return next((f"{name}={environ[name]} is set" for name in names if name in environ), "")


def choose_environment(
    environ: Mapping[str, str] = os.environ,
    tuned: Mapping[str, str] | None = None,
    source: str = "",
    users_threads: str = "",
) -> Choices:
    """Decide on the variables to set before MPI and Horovod start.

    Args:
        environ: the environment, with the user's variables, which come first.
        tuned: what `hvdkit tune` has found for this job, which comes next.
        source: where that was read.
        users_threads: as in `with_threads`.
    """
    wanted = dict(defaults(mpi_of(environ)))
    wanted.update({name: (value, f"found by hvdkit tune, in {source}") for name, value in (tuned or {}).items()})
    chosen: dict[str, str] = {}
    reasons = []
    for name, (value, reason) in wanted.items():
        if name in environ:
            reasons.append(f"{name}={environ[name]} left alone: it is set")
        elif name == THREADS and _threads_are_set(users_threads, environ):
            pass  # which `with_threads` leaves alone
        else:
            chosen[name] = value
            reasons.append(f"{name}={value}: {reason}")
    return Choices(environment=chosen, reasons=tuple(reasons))


def stall_limits(seconds: float) -> dict[str, str]:
    """Settings with which Horovod ends a job within `seconds` of the first rank's wait for one that does not come.

    Horovod looks once in the time after which it warns, in whole seconds, and only ends what has waited longer
    than both limits at that moment. An operation like an earlier one, as in each step, begins to count when it has
    waited for the warning's time at such a look.
    """
    if seconds == 0:
        return {"HOROVOD_STALL_CHECK_DISABLE": "1"}
    warning = max(1, int(seconds / 10))
    shutdown = max(warning + 1, int(seconds) - 3 * warning)
    return {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(warning),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(shutdown),
    }


def with_memory_kept(choices: Choices, environ: Mapping[str, str] = os.environ) -> Choices:
    """Have glibc's malloc keep the memory that a step gives back, for the next one, and say so.

    By itself it gives blocks of 32 MB and more back to the kernel when they are freed, so large layers' activations
    and gradients are mapped, and zeroed page by page, anew in each step. Source: mallopt(3). Nothing is done where the
    environment has settings for malloc, or malloc is not glibc's.
    """
    own = sorted(name for name in environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD"))
    if own:
        return replace(choices, reasons=(*choices.reasons, f"malloc left alone: {own[0]} is set"))
    try:
        libc = ctypes.CDLL(None)
        kept = hasattr(libc, "gnu_get_libc_version") and all(libc.mallopt(*option) for option in _MALLOC)
    except (OSError, AttributeError):
        kept = False
    if not kept:
        return choices
    reason = "malloc keeps freed memory: a step of 25 million parameters took 124 ms in place of 156"
    return replace(choices, reasons=(*choices.reasons, reason))


def return_unused_memory() -> None:
    """Give the kernel back what malloc keeps of the start: temporaries of the initial weights and of their broadcast.

    A step's own are not of the same sizes, and would come on top. Source: malloc_trim(3). Only glibc's malloc can.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def with_determinism(choices: Choices) -> Choices:
    """Add what keeps apart gradients that happen to be ready together: two optimizers', and the buckets of a GPU's.

    Where in its buffer a value lies can decide in which order more than two ranks' values are added.
    On a CPU one optimizer's gradients travel as one group, always alike.
    """
    name = "HOROVOD_DISABLE_GROUP_FUSION"
    reason = f"{name}=1: with it nothing that changes from run to run decides the order of additions"
    return replace(choices, environment={**choices.environment, name: "1"}, reasons=(*choices.reasons, reason))


def with_threads(
    choices: Choices,
    local_size: int,
    environ: Mapping[str, str] = os.environ,
    cores: int | None = None,
    around: int | None = None,
    users_threads: str = "",
) -> Choices:
    """Add the number of compute threads, once the number of workers on this host is known.

    Args:
        choices: what was decided already.
        local_size: workers on this host.
        environ: the environment, with the user's variables.
        cores: that this process may use; None asks the operating system.
        around: cores that the host's workers may use together, at least `cores`; None asks the operating system.
        users_threads: how the user has set the framework's own number of them, in words; empty: it is not set.

    Raises:
        UsageError: HVDKIT_THREADS is no number of threads.
    """
    asked = environ.get(THREADS)
    if asked is not None:
        if not re.fullmatch("[1-9][0-9]{0,3}", asked):
            raise UsageError(f"{THREADS} is {asked!r}: expected a number of threads, 1 to 9999.")
        return _with(choices, f"{asked} compute thread(s): {THREADS}", threads=int(asked))
    if why := _threads_are_set(users_threads, environ):
        return _with(choices, f"compute threads left alone: {why}")
    own = usable_cores() if cores is None else cores
    available = max(own, host_cores() if around is None and cores is None else around or own)
    threads = max(1, min(own, available // local_size))
    bound = f", of which this one is bound to {own}" if own < available else ""
    reason = f"{threads} compute thread(s): {available} core(s) for {local_size} worker(s) on this host{bound}"
    return _with(choices, reason, threads=threads)


def _threads_are_set(users_threads: str, environ: Mapping[str, str]) -> str:
    return what_is_set(["OMP_NUM_THREADS"], environ) or users_threads


def with_affinity(
    choices: Choices,
    local_rank: int,
    local_size: int,
    environ: Mapping[str, str] = os.environ,
    cores: Collection[int] | None = None,
    bound: bool | None = None,
    root: Path = Path("/"),
) -> Choices:
    """Add the CPUs that this process is kept to, where HVDKIT_AFFINITY=1 asks for it: whole physical cores.

    Where workers are more than cores, it is hardware threads, so that as few workers as can be share a core.

    It is not done of its own accord: two jobs on one machine would keep to the same cores, as neither knows of the
    other. With other jobs on 2 cores, 2 workers kept to a core each took 3.5 times as long a step (median of 5 pairs
    of runs of a CNN), as they can't move to where there is time for them.

    Args:
        choices: what was decided already.
        local_rank: this worker among those on its host, from 0.
        local_size: workers on this host.
        environ: the environment.
        cores: numbers of the logical CPUs that this process may use; None asks the operating system.
        bound: whether the launcher has chosen them; None asks the operating system.
        root: where /sys is.

    Raises:
        UsageError: HVDKIT_AFFINITY is neither 0 nor 1.
    """
    asked = environ.get(AFFINITY, "0")
    if asked not in ("0", "1"):
        raise UsageError(f"{AFFINITY} is {asked!r}: expected 1, each worker to its own cores, or 0.")
    if asked == "0":
        return choices
    allowed = sorted(os.sched_getaffinity(0) if cores is None else cores)
    if is_bound() if bound is None else bound:
        return _with(choices, f"cores left alone: the launcher has bound this worker to {_listed(allowed)}")
    if len(allowed) < local_size:
        return _with(choices, f"cores left alone: {len(allowed)} for {local_size} workers on this host")
    parts = physical_cores(allowed, root)
    if len(parts) < local_size:
        parts = [(cpu,) for threads in parts for cpu in threads]
    of_mine = parts[local_rank * len(parts) // local_size : (local_rank + 1) * len(parts) // local_size]
    mine = tuple(sorted(cpu for threads in of_mine for cpu in threads))
    return _with(choices, f"kept to CPU(s) {_listed(mine)}: {AFFINITY}=1", cores=mine)


def _with(choices: Choices, reason: str, **changes: Any) -> Choices:
    return replace(choices, reasons=(*choices.reasons, reason), **changes)


def _listed(cores: Sequence[int]) -> str:
    """Numbers of CPUs in few words: 0-3, or 0,2,4."""
    whole = len(cores) > 2 and cores[-1] - cores[0] == len(cores) - 1
    return f"{cores[0]}-{cores[-1]}" if whole else ",".join(map(str, cores))

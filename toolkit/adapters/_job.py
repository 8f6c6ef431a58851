"""A worker's part in the job: Horovod's start, the group of workers it belongs to, and how failures end the job."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from horovod.common import process_sets
from horovod.common.process_sets import ProcessSet, global_process_set

from toolkit import connections, devices, elastic, tuned, tuning, watch, world
from toolkit.adapters import _mpi
from toolkit.adapters._mpi import MpiWire
from toolkit.errors import UsageError
from toolkit.sharding import block
from toolkit.tuning import Choices
from toolkit.world import World

_process_sets: dict[str, Any] = {}  # this worker's group, as Horovod knows it; empty where there are no groups
_cycles: dict[str, str] = {}  # milliseconds, as the environment has them; empty where they are not ours to choose
_chosen: Mapping[str, str] = {}  # variables that tuning has set, as the user had not
_explains = False
_deterministic = False
_gpu: int | None = None  # this worker's, as its framework numbers them
_has_chosen = False  # between that and the CPU
_uuid = ""  # the same GPU's; "" on the CPU
_reduces_on_gpu = False
_distributed = itertools.count()  # calls of distribute() since Horovod was started
_batch_norms = itertools.count()  # layers that synchronize_batch_norm() has changed since then


def process_set(everyone: bool = False) -> Any:
    """The workers that a collective operation is about: this worker's group, or the whole job."""
    return global_process_set if everyone else _process_sets.get("group", global_process_set)


def is_parallel(hvd: Any) -> bool:
    """Whether Horovod is started, and this worker has others in its group; an elastic job's change."""
    return hvd.is_initialized() and process_set().size() > 1


def collective_name() -> str:
    """A name for an optimizer's collective operations: the i-th distribute()'s, alike on every rank."""
    return f"gradients{next(_distributed)}"


def batch_norm_name() -> str:
    """A name for a BatchNorm layer's collective operations: the i-th one that is synchronised, alike on every rank."""
    return f"batch_norm{next(_batch_norms)}"


def root_rank() -> int:
    """The rank within the whole job, as Horovod wants it, of the group's rank 0."""
    group = _process_sets.get("group")
    return group.ranks[0] if group else 0


def start_horovod(
    hvd: Any,
    framework: Any,
    *,
    tune: bool,
    verbose: bool,
    deterministic: bool,
    groups: int,
    stall_timeout: float,
    device: str,
) -> tuple[World, Choices]:
    """Tune the environment, start Horovod and make this process's failures end the job.

    In an elastic job it is called again, after `stop_horovod`, when the workers have changed.

    Args:
        hvd: `horovod.torch` or `horovod.tensorflow`.
        framework: a module with `users_threads` and `visible_gpus`.
        tune, verbose, deterministic, groups, stall_timeout, device: as `start` has them.

    Returns:
        The world, and what tuning chose for the framework's threads.

    Raises:
        UsageError: the launcher started more workers than found each other, or fewer than groups.
    """
    global _distributed, _batch_norms, _explains, _chosen, _deterministic
    _deterministic = deterministic
    _distributed, _batch_norms = itertools.count(), itertools.count()  # workers that come to an elastic job begin at 0
    launched = world.from_launcher()
    end_job_on_exception(launched or World())
    if launched is None:  # one worker needs no MPI, which would look for its daemon
        os.environ.setdefault("HOROVOD_CONTROLLER", "gloo")
        os.environ.setdefault("HOROVOD_CPU_OPERATIONS", "gloo")
    size = launched.size if launched else 1
    if not 1 <= groups <= size:
        raise UsageError(f"{groups} groups of {size} worker(s): give at least 1 group and at most one a worker.")
    if groups > 1 and elastic.is_active():
        raise UsageError("--fold-groups in an elastic job: start it without --host-discovery-script, or leave it out.")
    users_threads = framework.users_threads() if tune else ""
    choices = Choices()
    if tune:
        place = "cpu" if device == "cpu" or not framework.visible_gpus() else "gpu"
        choices = _choose(hvd.__name__.rpartition(".")[2], place, launched or World(), users_threads)
    if deterministic:
        choices = tuning.with_determinism(choices)
    os.environ.update(choices.environment)
    _chosen = choices.environment
    for name, value in tuning.stall_limits(stall_timeout).items():
        os.environ.setdefault(name, value)
    if groups > 1:  # one that is done early waits for the others as long as it takes
        os.environ.setdefault("HOROVOD_STALL_CHECK_DISABLE", "1")
    sets = (
        [ProcessSet(list(range(size)[block(size, group, groups)])) for group in range(groups)] if groups > 1 else None
    )
    if elastic.is_active():  # how long workers wait for one that has yet to import its framework, or Horovod aborts
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", "120")
    if launched is not None and not elastic.is_active():
        _mpi.start()
    with connections.noted() if elastic.is_active() else contextlib.nullcontext():
        hvd.init(process_sets=sets)
    _cycles.clear()
    if choices.environment.get("HOROVOD_CYCLE_TIME") == tuning.CYCLE_TIME and not sets:  # not one that tune has found
        _cycles.update(fast=tuning.CYCLE_TIME, slow=tuning.SLOW_CYCLE)
    here = world.from_horovod(hvd)
    if launched is not None and launched.size != here.size and not elastic.is_active():
        raise UsageError(
            f"the launcher started {launched.size} workers, but Horovod found {here.size}: "
            "start them with the mpirun or horovodrun of the MPI that Horovod was built with."
        )
    if sets:
        number = next(i for i, ranks in enumerate(sets) if ranks.included())
        _process_sets["group"] = sets[number]
        here = replace(here, rank=sets[number].rank(), size=sets[number].size(), group=number, groups=groups)
    end_job_on_exception(here)
    if tune:
        choices = tuning.with_memory_kept(choices)
        choices = tuning.with_threads(choices, here.local_size, users_threads=users_threads)
        choices = tuning.with_affinity(choices, here.local_rank, here.local_size)
    if choices.cores is not None:
        os.sched_setaffinity(0, choices.cores)
    _explains = verbose and here.rank == here.group == 0
    explain(choices.explain())
    return here, choices


def explain(lines: str) -> None:
    """Print what was decided, where `start` was told to be verbose."""
    if _explains:
        print(lines, flush=True)


def is_deterministic() -> bool:
    """Whether `start` was told that nothing which changes from run to run may decide how numbers are added."""
    return _deterministic


def choose_device(hvd: Any, here: World, asked: str, share: bool, framework: Any) -> World:
    """Take this worker's GPU, or the CPU; the first thing that `start` does with the framework, which may then begin.

    All ranks call it together.

    Args:
        hvd: `horovod.torch` or `horovod.tensorflow`, started.
        here: this worker.
        asked: one of `toolkit.devices.DEVICES`; for "auto" the environment's HVDKIT_DEVICE counts, if it is set.
        share: whether workers may share a GPU.
        framework: a module with `visible_gpus`, `use_gpu` and `use_cpu`.

    Returns:
        `here`, with its device.

    Raises:
        UsageError: see `toolkit.devices.choose`.
    """
    global _gpu, _has_chosen
    if asked == "auto":
        asked = os.environ.get(devices.VARIABLE, asked)
    if not (_has_chosen and elastic.is_active()):  # a process that an elastic job starts anew computes where it did
        visible = 0 if asked == "cpu" else framework.visible_gpus()
        _gpu = devices.choose(asked, here, visible)
        if asked == "auto" and not share and (hvd.size() > 1 or elastic.is_active()):
            why_not = _why_not_auto(hvd, here, visible)
            _gpu = None if why_not else _gpu
            if why_not and hvd.rank() == 0:
                print(f"training on CPUs, though there are GPUs: {why_not}", file=sys.stderr, flush=True)
        _has_chosen = True
    if _gpu is None:
        framework.use_cpu()
        return here
    return replace(here, device=framework.use_gpu(_gpu))


def _why_not_auto(hvd: Any, here: World, visible: int) -> str | None:
    """See `devices.why_not_auto`; the same on all ranks where MPI can tell each of the others: no framework may yet."""
    wire = mpi_wire(hvd, global_process_set)
    if wire is None:  # the other workers of this host see what this one does, unless the launcher hands GPUs out
        same = (_place(here, rank % visible) for rank in range(here.local_size) if visible)
        return devices.why_not_auto(list(same), hvd.nccl_built())
    places, built = zip(*wire.gather((_place(here, _gpu), hvd.nccl_built())), strict=True)
    return devices.why_not_auto(places, all(built))


def _place(here: World, gpu: int | None) -> devices.Place:
    return devices.Place(here.name, socket.gethostname(), *(() if gpu is None else devices.identity(gpu)))


def check_devices(hvd: Any, here: World, asked: str, share: bool, gather: Callable[..., Any]) -> None:
    """Look that all workers together can compute where they are, and decide where gradients are added up.

    All ranks call it together.

    Args:
        hvd: `horovod.torch` or `horovod.tensorflow`, started.
        here: this worker, with its device.
        asked: as in `choose_device`.
        share: whether workers may share a GPU.
        gather: the adapter's.

    Raises:
        UsageError: see `toolkit.devices.check`.
    """
    global _reduces_on_gpu, _uuid
    place = _place(here, _gpu)
    _uuid = place.gpu
    places = gather(place, all_groups=True) if hvd.size() > 1 and asked != "cpu" else [place]
    why_not = devices.check(places, share)
    if why_not is None and not hvd.nccl_built():
        why_not = "Horovod was built without NCCL: `make setup GPU=1`"
    _reduces_on_gpu = why_not is None
    if hvd.size() > 1 and _gpu is not None and why_not and hvd.rank() == 0:
        print(f"gradients go through the host's memory: {why_not}", file=sys.stderr, flush=True)


def is_users(variable: str) -> bool:
    """Whether the user has set a variable, and no file of `hvdkit tune`, whose settings are wishes."""
    return variable in os.environ and variable not in _chosen


def has_gpu() -> bool:
    """Whether this worker computes on a GPU."""
    return _gpu is not None


def usage(peak_memory: Callable[[], int]) -> dict[str, float]:
    """See `toolkit.adapters.Adapter.usage`; given the function for the bytes, which is called where there is a GPU."""
    if not _uuid:
        return {}
    percent = devices.utilization(_uuid)
    told = {} if percent is None else {"gpu_utilization_percent": percent}
    return {"gpu_memory_megabytes": peak_memory() / 1e6, **told}


def reduces_on_gpu() -> bool:
    """Whether Horovod adds up what is in a GPU's memory there, by NCCL; else it goes through the host's."""
    return _reduces_on_gpu


def mpi_wire(hvd: Any, ranks: ProcessSet) -> MpiWire | None:
    """The wire through MPI between some workers, where there is one; they call it together for the first time."""
    return _mpi.wire(hvd, ranks.ranks or range(hvd.size()))


def restart_horovod(hvd: Any, cycle: str) -> None:
    """Start Horovod again with its "fast" or "slow" cycle; all ranks call it together.

    Where MPI adds up the gradients Horovod has little to do, and its thread, which meets the other ranks' in each
    cycle, only keeps cores from computing. Nothing is done where the user set the cycle, or there are groups, or what
    the script had of Horovod would be lost: process sets of its own, and the timeline, which begins anew.
    """
    if cycle not in _cycles or os.environ["HOROVOD_CYCLE_TIME"] == _cycles[cycle]:
        return
    wire = mpi_wire(hvd, global_process_set)
    # The first rank to shut Horovod down does it on all, where it could then not be asked any more.
    if wire is None or any(wire.gather("HOROVOD_TIMELINE" in os.environ or _has_process_sets())):
        return
    os.environ["HOROVOD_CYCLE_TIME"] = _cycles[cycle]
    hvd.shutdown()
    hvd.init()


def keep_quick(hvd: Any) -> None:
    """Leave Horovod its fast cycle from here on, also where MPI adds up gradients; all ranks call it together.

    For operations of Horovod's that each step waits for: an optimizer's, or those of the model's layers.
    """
    if _cycles:
        restart_horovod(hvd, "fast")
        _cycles["slow"] = _cycles["fast"]


def _has_process_sets() -> bool:
    """Whether Horovod knows of others than that of all workers."""
    return len(process_sets._basics._get_process_set_ids_and_ranks()) > 1


def _choose(framework: str, device: str, launched: World, users_threads: str) -> Choices:
    """The variables to set, with what `hvdkit tune` has found for a job like this one."""
    if elastic.is_active():  # its workers and their number change
        return tuning.choose_environment()
    job = tuned.Job(
        framework,
        launched.size,
        launched.local_size,
        tuning.host_cores(),
        device,
        tuning.mpi_of(),
        tuned.options_of(sys.argv[1:]),
    )
    path, environment, why_not = tuned.take_up(Path(sys.argv[0]).stem, job, launched)
    choices = tuning.choose_environment(tuned=environment, source=str(path), users_threads=users_threads)
    return replace(choices, reasons=(*choices.reasons, why_not)) if why_not else choices


def stop_horovod(hvd: Any, gather: Callable[..., Any]) -> None:
    """Leave the job; groups leave together, as the first to leave ends the others' operations."""
    if not watch.stop():
        return
    if _process_sets and hvd.is_initialized():
        gather(None, all_groups=True)
    with watch.waiting(watch.LEAVING):
        hvd.shutdown()
    if elastic.is_active():
        connections.cut()
        connections.forget()


def begin_watch(hvd: Any, here: World, gather: Callable[..., Any], timeout: float) -> None:
    """Have the workers watch over each other; the last thing that an adapter's `start` does."""
    watch.start(
        here,
        rank=hvd.rank(),
        size=hvd.size(),
        hosts_alike=hvd.local_size() == hvd.size(),
        gather=lambda value: gather(value, all_groups=True),
        timeout=timeout,
        waits=os.environ.get("HOROVOD_STALL_CHECK_DISABLE", "0") != "0",
    )
    atexit.register(watch.at_exit, hvd.shutdown)  # before Horovod's own, which was registered earlier


def require_started(hvd: Any) -> None:
    """Raise `UsageError` where `start()` was not called yet."""
    if not hvd.is_initialized():
        raise UsageError("Horovod is not started: call start() once before any other function of the adapter.")


def end_job_on_exception(here: World) -> None:
    """Make an uncaught exception in this process end the whole job, naming this rank.

    The process leaves without Horovod's and MPI's shutdown, which would wait for the other ranks;
    its exit code makes the launcher end those that the watch does not.
    """
    watch.belongs_to(here)

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        watch.fail(error, "".join(traceback.format_exception(kind, error, trace)))

    sys.excepthook = excepthook

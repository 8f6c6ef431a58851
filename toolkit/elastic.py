"""Elastic training, under `horovodrun --min-np … --host-discovery-script …`: workers die and come, the run goes on.

Elastic is a resume from memory. Every `--commit-steps` steps each worker keeps what a checkpoint would hold. When
the workers change, those that are left start Horovod again, in the same process, and `fit` again, whose `Run` takes
up the newest of these commits where a resumed run takes up a checkpoint. Workers that come run the script from its
beginning, and meet the others there.

Horovod's part is what all its frameworks share (`horovod.common.elastic`): the news of hosts, and the two exceptions.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from toolkit import checkpoint, connections, ending
from toolkit.adapters import Adapter
from toolkit.checkpoint import Checkpoint
from toolkit.errors import RunFailed, UsageError
from toolkit.options import RunOptions
from toolkit.stopping import Signals, resume_command
from toolkit.watching.member import Here, when
from toolkit.watching.verdict import say
from toolkit.world import World

_FUTILE = 3  # failures in a row without a new commit between them, after which it is not the workers' coming and going
_LOOK = 0.1  # seconds between two looks
_fits = itertools.count()  # calls of decorated functions in this process
_joined: dict[str, World] = {}  # what the script's own world has become, for the calls after this one
T = TypeVar("T")


def is_active(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a worker of an elastic job."""
    return environ.get("HOROVOD_ELASTIC") == "1"


def elastic(adapter: Adapter) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make `fit(world, options, …)` outlive changes of the workers; outside of an elastic job, leave it as it is.

    `fit` builds model and optimizer and trains in one `Run`. It is called again, with the new world, whenever
    workers have died or come, so what it does before its `Run` it must be able to do again.

    Args:
        adapter: the adapter in use.
    """

    def decorate(fit: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(fit)
        def fit_elastically(world: World, options: RunOptions, *args: Any, **kwargs: Any) -> T:
            if not is_active():
                return fit(world, options, *args, **kwargs)
            return _call(Membership(adapter, next(_fits)), fit, _joined.get("world", world), options, *args, **kwargs)

        return fit_elastically

    return decorate


class Holder(NamedTuple):
    """Who has the newest commit.

    Attributes:
        rank: the worker.
        directory: the run's.
        step: of the commit; -1: there is none yet.
    """

    rank: int
    directory: Path
    step: int


class Membership:
    """This worker's part in an elastic job: what it holds of the run, and what it has heard of other hosts.

    Args:
        adapter: the adapter in use.
        number: how many calls of decorated functions came before this one in the script.

    Attributes:
        directory: the run's, once the workers have agreed on it.
        commit: what this worker holds in memory; complete: all ranks' states are in it.
    """

    def __init__(self, adapter: Adapter, number: int) -> None:
        self.adapter, self._number = adapter, number
        self.directory: Path | None = None
        self.commit: Checkpoint | None = None
        self.hosts_changed = threading.Event()
        self._has_run = False
        self._failures = 0

    def enter(self) -> Holder | None:
        """Agree with the other workers on what to go on from; None: on nothing, the run is new.

        The last commit may have come about on some of the workers only, so the newest counts, and of several
        that hold it the lowest rank's.

        Raises:
            UsageError: `fit` trains a second run.
            RunFailed: the others train in a later `fit` than this worker, which came meanwhile; on this worker alone.
        """
        if self._has_run:
            raise UsageError("elastic mode goes on with one run in fit(): train each run by a fit() of its own.")
        self._has_run = True
        step = _step(self.commit) if self.commit else -1
        held = self.adapter.gather((self.directory, step, self._number))
        latest = max(number for _, _, number in held)
        if self._number < latest:  # the others lose this worker, and go on
            raise RunFailed(
                f"the others train in fit() number {latest + 1} of this script already, and a worker that comes begins "
                f"with number {self._number + 1}: train each run by a script of its own."
            )
        holders = [Holder(rank, directory, step) for rank, (directory, step, _) in enumerate(held) if directory]
        return max(holders, key=lambda holder: (holder.step, -holder.rank), default=None)

    def keep(self, commit: Checkpoint) -> None:
        """Hold this commit in place of the one before; the first after a loss is often the same once more."""
        if self.commit is None or _step(commit) > _step(self.commit):
            self._failures = 0
        self.commit = commit

    def on_hosts_updated(self, timestamp: int, update: Any) -> None:
        """Note Horovod's news, which it tells rank 0 alone, in a thread of its own."""
        self.hosts_changed.set()

    def outlives(self, error: BaseException) -> bool:
        """Whether the run can go on after what `fit` raised, and with what is left; say so."""
        from horovod.common.exceptions import HostsUpdatedInterrupt

        if isinstance(error, HostsUpdatedInterrupt):
            return True
        if not _is_loss_of_a_worker(error):
            return False
        self._failures += 1
        return self._failures <= _FUTILE

    def join_again(self, options: RunOptions) -> World:
        """Leave the job as it was, and enter it as it is now; a worker whose host was taken out ends here."""
        self._has_run = False
        self.adapter.stop()
        gc.collect()  # of the model before, whose hooks and graphs hold each other
        self.hosts_changed.clear()  # all that was told until now is known to the job that is joined
        return self.adapter.start(**options.start)


class _Lookout(threading.Thread):
    """Ends this worker on a signal or when it is stuck, whatever the main thread waits for.

    horovodrun that was told to stop sends SIGTERM to all workers, and rank 0 saves the commit before it leaves. One
    that gets it alone, as from a host that is being taken down, leaves alone, and the others go on.

    horovodrun waits for a worker that is stuck without end, but not for one that has ended. Those that wait for it
    too long cut their connections, so that it is known there, and go on when it has ended.

    Args:
        membership: this worker's.
        world: as it is at first.
        options: the run's.

    Attributes:
        world: of the `fit` that is under way, or was last.
        trains: it is under way.
    """

    def __init__(self, membership: Membership, world: World, options: RunOptions) -> None:
        super().__init__(name="hvdkit-lookout", daemon=True)
        self.world, self.trains = world, True
        self._membership, self._keep = membership, options.keep
        self._limit, self._seconds = options.stall_timeout, 0.0
        self._seen: tuple[Any, ...] = ()
        self._over = threading.Event()
        self._signals = Signals()
        self._signals.install()
        self.start()

    def run(self) -> None:
        """Until the end."""
        while not self._over.wait(_LOOK):
            self._leave_if_told()
            self._look_for_stall()
        self._leave_if_told()

    def hold(self) -> None:
        """Where this worker leaves, let the caller do nothing more."""
        self.trains = False
        if self._signals.received is not None:
            self.join()

    def end(self) -> None:
        """Look no more; where this worker leaves, this does not return."""
        self._over.set()
        self.join()
        self._signals.restore()

    def _look_for_stall(self) -> None:
        seen = (Here.doing, Here.waiting, self.world)
        # Counted, not measured: while this process is stopped or starved, no time passes.
        self._seconds = self._seconds + _LOOK if seen == self._seen else 0.0
        self._seen = seen
        if not self.trains or not 0 < self._limit <= self._seconds:
            return
        this = f"[{self.world.name}] elastic: this worker"
        if Here.waiting[0]:
            say(f"{this} has waited for others for {self._limit:g} s{when(Here)}: those that are stuck are to end\n")
            connections.cut()
            self._seconds = 0.0
        elif Here.doing.startswith(("loading", "training")) and connections.any_is_cut():  # evaluations take their time
            say(f"{this} ends: it was stuck for {self._limit:g} s{when(Here)}\n")
            os._exit(1)

    def _leave_if_told(self) -> None:
        number, commit = self._signals.received, self._membership.commit
        if number is None:
            return
        if self.world.rank == 0 and commit is not None:
            say(f"[{self.world.name}] elastic: told to stop by {signal.Signals(number).name}; {self._saved(commit)}\n")
            ending.note(128 + number)
        os._exit(128 + number)

    def _saved(self, commit: Checkpoint) -> str:
        """Write a commit to the disk, and tell what came of it."""
        step = _step(commit)
        try:
            with checkpoint.WRITING:
                checkpoint.write(commit.path, step, commit.state, commit.manifest, self._keep)
        except OSError as error:
            return f"step {step} could not be saved: {checkpoint.reason(error)}"
        command = resume_command(commit.path, self.world.size)
        return f"step {step} is saved; where no others go on with it, to go on: {command}"


_current: list[Membership] = []  # of the fit() that runs in this process, for its Run


def current() -> Membership | None:
    """The membership for a `Run`; None outside of an elastic job.

    Raises:
        UsageError: the job is elastic and the script's `fit` is not decorated.
    """
    if is_active() and not _current:
        raise UsageError(
            "horovodrun was started with a host discovery script, which makes the job elastic, and the script is not: "
            "decorate its fit(world, options, …) with @elastic(dp)."
        )
    return _current[-1] if _current else None


def hosts_updated() -> Exception:
    """What to raise, on all workers alike, where there are other hosts than before."""
    from horovod.common.exceptions import HostsUpdatedInterrupt

    return HostsUpdatedInterrupt(skip_sync=False)


def _call(membership: Membership, fit: Callable[..., T], world: World, options: RunOptions, *args: Any, **kw: Any) -> T:
    from horovod.common.elastic import notification_manager

    notification_manager.init()
    notification_manager.register_listener(membership)
    _current.append(membership)
    lookout = _Lookout(membership, world, options)
    try:
        while True:
            try:
                return fit(world, options, *args, **kw)
            except Exception as error:
                if not membership.outlives(error):
                    raise
                lookout.hold()
                say(f"[{world.name}] {_told(error)}\n")
            # Out here, where nothing holds the error's frames.
            world = _joined["world"] = membership.join_again(options)
            Here.doing, Here.waiting = "", ("", 0.0)
            lookout.world, lookout.trains = world, True
    finally:
        lookout.end()
        _current.pop()
        notification_manager.remove_listener(membership)


def _step(commit: Checkpoint) -> int:
    return commit.manifest["position"]["step"]


def _is_loss_of_a_worker(error: BaseException) -> bool:
    """Whether a collective operation failed; TensorFlow tells so by errors of its own."""
    from horovod.common.exceptions import HorovodInternalError

    of_tensorflow = any(kind.__module__.startswith("tensorflow.") for kind in type(error).__mro__)
    return isinstance(error, HorovodInternalError) or (of_tensorflow and "Horovod" in str(error))


def _told(error: BaseException) -> str:
    from horovod.common.exceptions import HostsUpdatedInterrupt

    cause = "hosts came or went" if isinstance(error, HostsUpdatedInterrupt) else "a worker was lost"
    return f"elastic: {cause}; going on with those that there are"

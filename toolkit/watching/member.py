"""A worker as the others know it, and what rank 0's and the others' watching threads share."""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit import ending
from toolkit.watching.diagnosis import go_on
from toolkit.watching.lines import Line
from toolkit.watching.verdict import FILE, Verdict, leave, mute, say
from toolkit.world import World

BEAT = 1.0  # seconds between two signs of life of a worker, for up to 128 of them
SHARED = 5.0  # seconds in which an error that all ranks raise alike is expected from the lowest of them
LAST = 3.0  # seconds after which a worker ends by itself that knows the job has failed
_TERMINATED = 2.0  # seconds after SIGTERM in which the main thread ends this worker
ALL_GROUPS = " of all groups"  # ends the name of an operation that a group may come to much later than another


class Here:
    """What this worker does, for the others to be told; written by the main thread, read by the watch."""

    doing = ""
    waiting = "", 0.0  # in which operation of all ranks, since when; or when the last one was over
    directory: Path | None = None
    world = World()
    stopped = False
    exit_code: int | None = None  # of a sys.exit() that left the run


@dataclass
class Member:
    """A worker, as the others know it.

    Attributes:
        rank: in the whole job.
        name: as messages name it.
        world_rank: within its group.
        group: its group.
        host: its host name.
        pid: its process, on its host.
        line: the connection to it; None where there is none yet, or no more.
        heard: when it last gave a sign of life.
        doing: what it did then, and `doing_since`.
        waiting: the operation that it waited in then, and `waiting_since`; or "", and since when in none.
        directory: where its run writes, or "".
        left: how it left the job, or "".
        error: what it got because another had ended, or "".
        shared: an error that all ranks raise alike.
        stack: where its code stood when it was asked.
        warned: its silence has been told.
        met: it has sent something since it was welcomed.
    """

    rank: int
    name: str
    world_rank: int
    group: int
    host: str
    pid: int
    line: Line | None = None
    heard: float = 0.0
    doing: str = ""
    doing_since: float = 0.0
    waiting: str = ""
    waiting_since: float = 0.0
    directory: str = ""
    left: str = ""
    error: str = ""
    shared: dict[str, Any] = field(default_factory=dict)
    stack: str = ""
    warned: bool = False
    met: bool = False

    def verdict(self, cause: str, **more: Any) -> Verdict:
        """A verdict about this worker."""
        return Verdict(cause, self.name, self.world_rank, self.host, group=self.group, **more)

    def status(self, now: float) -> str:
        """What it does, in words."""
        if self.waiting:
            return f"waits in {self.waiting} for {now - self.waiting_since:.0f} s{when(self)}"
        return f"is {self.doing or 'at work'} for {now - self.doing_since:.0f} s"


class Watch(threading.Thread):
    """What rank 0's and the others' watches share: the thread, and the way from the main thread to it.

    Args:
        me: this worker.
        members: all workers, in rank order.
        key: the job's.
        timeout: seconds without a sign of life, or in an operation that some do not come to, after which the
            job ends; 0: never.
    """

    def __init__(self, me: Member, members: list[Member], key: bytes, timeout: float) -> None:
        super().__init__(name="hvdkit-watch", daemon=True)
        self.me, self.members, self.key, self.timeout = me, members, key, timeout
        self.beat = max(BEAT, len(members) / 128)
        self.selector = selectors.DefaultSelector()
        self.over = threading.Event()  # nothing more will be said
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._bell, self._wake = socket.socketpair()
        self._bell.setblocking(False)
        self._wake.setblocking(False)
        self.selector.register(self._bell, selectors.EVENT_READ, self._rung)
        self._signalled: tuple[float, bool] | None = None  # when, and whether it ends this process
        self._terminated_at: float | None = None  # by the first SIGTERM that does
        self._end_at: tuple[float, int] | None = None  # when and how this worker ends, as the job has failed
        self._pid = os.getpid()
        self._next_beat = self._last_tick = now = time.monotonic()
        for member in members:
            member.heard = member.doing_since = now

    # --- the main thread's side

    @property
    def alive(self) -> bool:
        """Whether there is a thread to tell; none in a forked process."""
        return self._pid == os.getpid() and self.is_alive() and not self.over.is_set()

    def tell(self, **message: Any) -> None:
        """Hand a message of this worker to the thread."""
        self._inbox.put(message)
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def hear_signals(self) -> None:
        """Have Python tell the thread of signals, also while the main thread is stuck."""
        with contextlib.suppress(ValueError):  # not in the main thread
            earlier = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
            if earlier != -1:
                signal.set_wakeup_fd(earlier)
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, self._terminated)

    def leave_signals(self) -> None:
        """Put back what `hear_signals` has changed, where nobody else has taken signals over since."""
        with contextlib.suppress(ValueError):
            current = signal.set_wakeup_fd(-1)
            if current not in (-1, self._wake.fileno()):
                signal.set_wakeup_fd(current)
            if signal.getsignal(signal.SIGTERM) == self._terminated:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _terminated(self, number: int, frame: Any) -> None:
        """End by SIGTERM, but let the thread say first why, where the launcher sends it on account of a failure."""
        signal.signal(number, signal.SIG_DFL)
        if self.alive:
            self.over.wait(1)
        if self.alive and self._failing():
            self.over.wait(LAST)
        else:
            ending.note(128 + number)
        os.kill(os.getpid(), number)

    def _failing(self) -> bool:
        """Whether the job has failed, as far as is known here: then that decides how this worker ends."""
        return self._end_at is not None or any(member.error for member in self.members)

    def close_in_child(self) -> None:
        """Close what a forked process has of the sockets: the others must see this process's end."""
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        self.close()

    # --- the thread

    def _rung(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._bell.recv(4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    ends = signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, self._terminated)
                    self._signalled = time.monotonic(), ends
                    if number == signal.SIGTERM and ends and self._terminated_at is None:
                        self._terminated_at = time.monotonic()

    def stopped_by_signal(self) -> bool:
        """Whether the whole job has just been told to stop, so that workers' ends are no news.

        A launcher sends SIGTERM on account of a worker's end too, in the same moment. Where a run takes signals as
        wishes, workers go on, and one that ends is news; but a launcher that was told to stop kills all of them some
        seconds later: then this does not return.
        """
        if self._signalled is None or not 0.3 < time.monotonic() - self._signalled[0] < 10:
            return False
        if not self._signalled[1]:
            time.sleep(1)
        return self._signalled[1]

    def run(self) -> None:
        """Until the job is over."""
        try:
            while not self.over.is_set():
                for key, _ in self.selector.select(timeout=max(0.0, min(0.25, self._next_beat - time.monotonic()))):
                    key.data()
                while not self._inbox.empty():
                    self.told(self._inbox.get())
                self._tick()
        except Exception:  # noqa: BLE001 - training goes on without a watch
            say(f"[{self.me.name}] warning: this worker is no longer watched:\n{traceback.format_exc()}")
        self.over.set()
        self.close()

    def _tick(self) -> None:
        now = time.monotonic()
        if self._terminated_at is not None and now - self._terminated_at > _TERMINATED and not self._failing():
            leave(128 + signal.SIGTERM)  # the main thread is in Horovod, and hears of no signal
        if now - self._last_tick > max(3.0, 2 * self.beat):  # the silence was this process's own
            for member in self.members:
                member.heard += now - self._last_tick
            self._last_tick = now
            return  # to read first what has come meanwhile
        self._last_tick = now
        self._look_at_myself(now)
        if now >= self._next_beat:
            self._next_beat = now + self.beat
            self.beat_now(now)
        self.look(now)

    def _look_at_myself(self, now: float) -> None:
        me = self.me
        me.heard = now
        if me.doing != Here.doing:
            me.doing, me.doing_since = Here.doing, now
        me.waiting, me.waiting_since = Here.waiting
        me.directory = str(Here.directory or "")

    def told(self, message: dict[str, Any]) -> None:
        """Take a message of this worker's main thread."""
        raise NotImplementedError

    def beat_now(self, now: float) -> None:
        """Give a sign of life."""
        raise NotImplementedError

    def look(self, now: float) -> None:
        """Look whether something has gone wrong."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the connections."""
        for key in list(self.selector.get_map().values()):
            if key.fileobj is self._bell and os.getpid() == self._pid:
                continue  # Python goes on to ring it, and complains where it can't
            with contextlib.suppress(OSError):
                key.fileobj.close()  # type: ignore[union-attr]

    def warn(self, text: str) -> None:
        """Print a line on this worker."""
        say(f"[{self.me.name}] warning: {text}\n")

    def report(self, verdict: Verdict, directory: str = "", silence: float = 0.0) -> None:
        """Print the verdict and write its file; see `Verdict.write`."""
        place = Path(directory) if directory else Here.directory
        more = (
            f"--resume goes on from the run's last checkpoint, if it has one; more in {place / FILE}\n"
            if place and verdict.kept
            else ""
        )
        say(verdict.text + more)
        verdict.write(place, Here.directory, silence=silence)
        mute()

    def wake(self, member: Member) -> None:
        """Have a stopped worker of this host go on, and see the end."""
        if member.host == self.me.host:
            go_on(member.pid)

    def drop(self, line: Line) -> None:
        """Close a connection."""
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(line.socket)
        line.close()


def failure(member: Member, message: dict[str, Any]) -> Verdict:
    """The verdict about an exception that a worker has sent."""
    code = message.get("code")
    exception, trace = message.get("exception"), message.get("traceback")
    return member.verdict(
        str(message.get("cause")),
        exception=None if exception is None else str(exception),
        traceback=None if trace is None else str(trace),
        code=code if isinstance(code, int) and 0 < code < 256 else 1,
        kept=bool(message.get("kept", True)),
        shown=str(message.get("shown", "")),
    )


def deputies(members: Sequence[Member]) -> list[int]:
    """Whom rank 0 has speak when it is lost: the lowest rank that is there, and the lowest on another host."""
    there = [m for m in members[1:] if m.line is not None and (m.waiting or not m.left)]
    far = [m for m in there if m.host != members[0].host]
    return list(dict.fromkeys(m.rank for m in [*there[:1], *far[:1]])) or [1]


def when(worker: Member | type[Here]) -> str:
    """What a worker did, where a run tells it."""
    return f" when {worker.doing}" if worker.doing else ""


def waits_for(worker: Member) -> str:
    """What a worker waits for: in a compiled step there is no telling but that it is the gradients' averaging."""
    gradients = "the gradients' averaging" if worker.doing.startswith("training") else "an operation of all"
    return (worker.waiting or gradients) + when(worker)


def seconds(value: Any) -> float:
    """A number from a message; 0 where it is none."""
    return float(value) if isinstance(value, int | float) else 0.0

"""Watches over the workers of a job, so that it ends when one of them fails, vanishes or stalls, and says which.

Every worker has a thread that keeps a TCP connection to rank 0's; when rank 0 itself is lost, the lowest rank left
speaks. The thread goes on while the main thread waits in Horovod. Messages are JSON lines of limited length, between
workers that prove to each other that they know the job's random key.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import queue
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.errors import RunFailed, UsageError
from toolkit.verdict import FILE, Verdict, is_consequence, leave, mute, say
from toolkit.world import World

_BEAT = 1.0  # seconds between two signs of life of a worker, for up to 128 of them
_ANSWER = 2.0  # seconds that a worker has to answer, or to come to the same error as another
_SHARED = 5.0  # seconds in which an error that all ranks raise alike is expected from the lowest of them
_FAREWELL = 0.5  # seconds between the failed worker's exit and the others', so that launchers name the first
_LAST = 3.0  # seconds after which a worker ends by itself that knows the job has failed
_GREETING, _MESSAGE = 1 << 10, 1 << 20  # longest line in bytes, before and after a worker is known


class _Here:
    """What this worker does, for the others to be told; written by the main thread, read by the watch."""

    doing = ""
    waiting: tuple[str, float] | None = None  # in which operation of all ranks, since when
    directory: Path | None = None
    world = World()
    stopped = False
    exit_code: int | None = None  # of a sys.exit() that left the run


_watch: _Watch | None = None


def belongs_to(world: World) -> None:
    """Name this worker in what it reports."""
    _Here.world = world


def doing(text: str) -> None:
    """Note what this worker does now; costs an assignment."""
    _Here.doing = text


class waiting:  # noqa: N801 - used like a function
    """Notes, in a `with` block, that this worker waits for all others in an operation."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        _Here.waiting = (self._what, time.monotonic())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:  # else it is what the error's report tells
            _Here.waiting = None


def directory(path: Path) -> None:
    """Where a failure's error.json belongs from now on; rank 0 removes an earlier one."""
    _Here.directory = path.absolute()
    if _Here.world.rank == 0:
        with contextlib.suppress(OSError):
            (path / FILE).unlink(missing_ok=True)


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
        waiting: the operation that it waited in then, or "", and `waiting_since`.
        directory: where its run writes, or "".
        left: how it left the job, or "".
        error: what it got because another had ended, or "".
        shared: an error that all ranks raise alike.
        stack: where its code stood when it was asked.
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

    def verdict(self, cause: str, **more: Any) -> Verdict:
        """A verdict about this worker."""
        return Verdict(cause, self.name, self.world_rank, self.host, group=self.group, **more)

    def status(self, now: float) -> str:
        """What it does, in words."""
        if self.waiting:
            return f"waits in {self.waiting} for {now - self.waiting_since:.0f} s{_when(self)}"
        return f"is {self.doing or 'at work'} for {now - self.doing_since:.0f} s"


class Line:
    """JSON messages over a socket, one a line; the other side may be anyone until it is `known`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER)
        self.socket = connection
        self.known = False
        self.began = time.monotonic()
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Send; what can't be sent is lost, and noticed by the silence."""
        with contextlib.suppress(OSError, ValueError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come.

        Raises:
            EOFError: the other side is gone, or sends what is none of ours.
        """
        limit = _MESSAGE if self.known else _GREETING
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            raise EOFError from None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or max(map(len, [*lines, self._rest])) > limit:
            raise EOFError
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise EOFError from None
        if not all(isinstance(message, dict) for message in messages):
            raise EOFError
        return messages

    def close(self) -> None:
        """Close; the other side sees the end."""
        with contextlib.suppress(OSError):
            self.socket.close()


def proof(key: bytes, *parts: str) -> str:
    """What only a worker of this job can answer to a challenge."""
    return hmac.new(key, "|".join(parts).encode(), hashlib.sha256).hexdigest()


class _Watch(threading.Thread):
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
        self.beat = max(_BEAT, len(members) / 128)
        self.selector = selectors.DefaultSelector()
        self.over = threading.Event()  # nothing more will be said
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._bell, self._wake = socket.socketpair()
        self._bell.setblocking(False)
        self._wake.setblocking(False)
        self.selector.register(self._bell, selectors.EVENT_READ, self._rung)
        self._signalled: tuple[float, int] | None = None
        self._pid = os.getpid()
        self._next_beat = self._last_tick = now = time.monotonic()
        self._woke = -_LAST
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

    def _terminated(self, number: int, frame: Any) -> None:
        """End by SIGTERM, but let the thread say first why, where the launcher sends it on account of a failure."""
        signal.signal(number, signal.SIG_DFL)
        if self.alive:
            self.over.wait(1)
        os.kill(os.getpid(), number)

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
                    self._signalled = time.monotonic(), number

    def stopped_by_signal(self) -> bool:
        """Whether the whole job has just been told to stop, so that workers' ends are no news.

        A launcher sends SIGTERM on account of a worker's end too, in the same moment.
        """
        return self._signalled is not None and 0.3 < time.monotonic() - self._signalled[0] < 10

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
        if self._was_stopped(now):  # the silence was this process's own
            for member in self.members:
                member.heard += now - self._last_tick
            self._woke = now
        self._last_tick = now
        self._look_at_myself(now)
        if now >= self._next_beat:
            self._next_beat = now + self.beat
            self.beat_now(now)
        self.look(now)

    def _was_stopped(self, now: float) -> bool:
        return now - self._last_tick > max(3.0, 2 * self.beat)

    def _missed_the_end(self) -> bool:
        """Whether this process has just gone on after a stop: those that are gone by now have ended on its account."""
        now = time.monotonic()
        return self._was_stopped(now) or now - self._woke < _LAST

    def _look_at_myself(self, now: float) -> None:
        me, waits = self.me, _Here.waiting
        me.heard = now
        if me.doing != _Here.doing:
            me.doing, me.doing_since = _Here.doing, now
        me.waiting, me.waiting_since = waits or ("", 0.0)
        me.directory = str(_Here.directory or "")

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
            with contextlib.suppress(OSError):
                key.fileobj.close()  # type: ignore[union-attr]

    def warn(self, text: str) -> None:
        """Print a line on this worker."""
        say(f"[{self.me.name}] warning: {text}\n")

    def report(self, verdict: Verdict, directory: str = "") -> None:
        """Print the verdict and write its file."""
        say(verdict.text)
        place = Path(directory) if directory else _Here.directory
        verdict.write(place if place is not None and place.is_dir() else _Here.directory)
        mute()

    def drop(self, line: Line) -> None:
        """Close a connection."""
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(line.socket)
        line.close()


class Hub(_Watch):
    """Rank 0's: hears of every worker, decides what has ended the job, and tells."""

    def __init__(
        self, me: Member, members: list[Member], key: bytes, timeout: float, listener: socket.socket, waits: bool
    ) -> None:
        super().__init__(me, members, key, timeout)
        self._listener, self._own_waits = listener, waits
        self._strangers: set[Line] = set()
        self._first_error = self._first_shared = 0.0
        self._asked = self._warned_of_waits = False
        self._oom = oom_kills()
        self._until = time.monotonic() + 15  # by when all have called
        self.selector.register(listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        line = Line(connection)
        if len(self._strangers) > 2 * len(self.members) + 16:
            line.close()
            return
        self._strangers.add(line)
        challenge = secrets.token_hex(16)
        line.send(challenge=challenge)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._greeted(line, challenge))

    def _greeted(self, line: Line, challenge: str) -> None:
        """A stranger has sent its first line, or should have."""
        try:
            messages = line.receive()
            if not messages:
                return
            rank, said, answer = (messages[0].get(name) for name in ("rank", "proof", "challenge"))
            right = proof(self.key, "worker", str(rank), challenge)
            if not hmac.compare_digest(str(said).encode(), right.encode()):
                raise EOFError
            member = self.members[int(str(rank))]
            if member is self.me or member.line is not None:
                raise EOFError
        except (EOFError, ValueError, IndexError):
            self._strangers.discard(line)
            self.drop(line)
            return
        self._strangers.discard(line)
        line.known = True
        member.line, member.heard = line, time.monotonic()
        line.send(welcome=proof(self.key, "rank 0", str(answer)))
        self.selector.modify(line.socket, selectors.EVENT_READ, lambda: self._heard(member))

    def _heard(self, member: Member) -> None:
        line = member.line
        if line is None:
            return
        try:
            messages = line.receive()
        except EOFError:
            self._lost(member)
            return
        member.heard = time.monotonic()
        if member.warned:
            member.warned = False
            self.warn(f"{member.name} is back.")
        for message in messages:
            self._take(member, message)

    def told(self, message: dict[str, Any]) -> None:
        """Take a message of this worker's main thread."""
        self._look_at_myself(time.monotonic())
        self._take(self.me, message)
        if message["kind"] == "left":
            for other in self._others():
                other.send(kind="left", how=message["how"])

    def _others(self) -> list[Line]:
        return [member.line for member in self.members if member.line is not None]

    def _take(self, member: Member, message: dict[str, Any]) -> None:
        kind, now = message.get("kind"), time.monotonic()
        if kind == "beat" or "doing" in message:
            member.doing, member.waiting = str(message.get("doing")), str(message.get("waiting", ""))
            member.doing_since = now - _seconds(message.get("doing_for"))
            member.waiting_since = now - _seconds(message.get("waiting_for"))
            member.directory = str(message.get("directory", ""))
        if kind == "failure":
            self._end(failure(member, message), member)
        elif kind == "shared":
            member.shared = message
            self._first_shared = self._first_shared or now
        elif kind == "consequence":
            member.error = str(message.get("text"))
            self._first_error = self._first_error or now
        elif kind == "left":
            member.left = str(message.get("how"))
        elif kind == "stack":
            member.stack = str(message.get("text"))

    def _lost(self, member: Member) -> None:
        """A worker's connection has closed."""
        line, member.line = member.line, None
        if line is not None:
            self.drop(line)
        if not member.left:
            more = why_killed(self._oom) if member.host == self.me.host else ""
            cause = f"ended without a word{_when(member)}: killed (kill -9, or out of memory) or crashed{more}."
            self._end(member.verdict(cause), member)

    def beat_now(self, now: float) -> None:
        """Tell the others that this worker lives, and who is to speak when it does not."""
        deputies = _deputies(self.members)
        for line in self._others():
            line.send(kind="beat", deputies=deputies)

    def look(self, now: float) -> None:
        """Look for silence, for waits that are too long, and for errors that another's end explains."""
        for line in [line for line in self._strangers if now - line.began > _LAST]:
            self._strangers.discard(line)
            self.drop(line)
        if self.me.left and not self._others() and now > self._until or all(m.left for m in self.members):
            for line in self._others():
                line.send(kind="over")
            self.over.set()
            return
        if self._first_shared:
            self._settle_shared(now)
        if self._first_error:
            self._settle_errors(now)
        elif self.timeout:
            self._look_for_silence(now)
            self._look_for_waits(now)

    def _settle_shared(self, now: float) -> None:
        """An error that all ranks of a group raise alike is told once, by the lowest that has it."""
        told = [member for member in self.members if member.shared]
        group = [member for member in self.members if member.group == told[0].group and member.line is not None]
        if self.me in told or all(member.shared for member in group) or now > self._first_shared + _SHARED:
            member = told[0]
            self._end(failure(member, member.shared), member)

    def _settle_errors(self, now: float) -> None:
        """Some got Horovod's error that another has ended: those that did not are the ones."""
        present = [m for m in self.members if m.line is not None or m is self.me]
        missing = [m for m in present if not m.error and not m.left]
        late = now - self._first_error
        if missing and late < _ANSWER + 1:
            if late > 1 and not self._asked:
                self._asked = True
                self._ask(missing)
            return
        left = [m for m in self.members if m.left]
        if left and not missing:
            self._end(left[0].verdict(f"left early: it {left[0].left}{self._waited(left)}."), left[0])
        elif missing:
            self._end_stalled(missing, now)
        else:
            first = next(m for m in self.members if m.error)
            self._end(first.verdict(f"Horovod ended on all ranks: {first.error}"), first)

    def _ask(self, members: Sequence[Member]) -> None:
        for member in members:
            if member is self.me:
                member.stack = stacks()
            elif member.line is not None:
                member.line.send(kind="stack?")

    def _look_for_silence(self, now: float) -> None:
        for member in self.members:
            silent = now - member.heard
            if member.line is None or member.left or silent < max(self.timeout / 5, 3 * self.beat):
                continue
            if not member.warned:
                member.warned = True
                limit = f"the job ends after {self.timeout:g} s (--stall-timeout)"
                self.warn(f"no sign of life of {member.name} for {silent:.0f} s; {limit}.")
            if silent >= self.timeout:
                self._end_stalled([member], now)

    def _look_for_waits(self, now: float) -> None:
        """Ranks in an operation that others of their group do not come to, where Horovod does not look itself."""
        waits = [m for m in self.members if m.waiting and not m.left and now - m.heard < 3 * self.beat]
        longest = max(waits, key=lambda m: now - m.waiting_since, default=None)
        if longest is None or now - longest.waiting_since < self.timeout / 5:
            self._warned_of_waits = False
            return
        group = [m for m in self.members if m.group == longest.group and not m.left]
        missing = [m for m in group if m.waiting != longest.waiting]
        if not missing:
            return
        waited = now - longest.waiting_since
        if not self._warned_of_waits and self._own_waits:
            self._warned_of_waits = True
            names = ", ".join(m.name for m in missing[:4])
            limit = f"the job ends after {self.timeout:g} s (--stall-timeout)"
            self.warn(f"{longest.name} waits for {names} in {longest.waiting} for {waited:.0f} s; {limit}.")
        if waited > self.timeout - 1 and not self._asked:
            self._asked = True
            self._ask(missing)
        if waited > self.timeout and not self._first_error:
            self._end_stalled(missing, now)

    def _waited(self, members: Sequence[Member]) -> str:
        """What the others were waiting for."""
        others = [m for m in self.members if m not in members and (m.waiting or m.error)]
        if not others:
            return ""
        what = _waits(others[0])
        names = ", ".join(m.name for m in others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        return f"; {names} waited for it in {what}"

    def _end_stalled(self, members: list[Member], now: float) -> None:
        first = members[0]
        silent = now - first.heard
        what = first.status(now)
        if silent > 3 * self.beat:
            state = process_state(first.pid) if first.host == self.me.host else ""
            what = f"gave no sign of life for {silent:.0f} s{_when(first)}{state}"
        others = "".join(f"; so is {m.name}: {m.status(now)}" for m in members[1:4])
        if len(members) > 4:
            others += f"; and {len(members) - 4} more"
        cause = f"did not come: it {what}{others}{self._waited(members)}."
        found = {m.name: m.stack for m in members if m.stack}
        self._end(first.verdict(cause, stacks=found, ranks=tuple(m.rank for m in members)), first)

    def _end(self, verdict: Verdict, member: Member) -> None:
        """Tell it, end the others, and this worker."""
        if not verdict.traceback and not verdict.shown and self.stopped_by_signal():
            verdict = replace(verdict, code=143)
        elif not verdict.exception and self._missed_the_end():
            pass
        else:
            self.report(verdict, member.directory)
        others = self._others()
        for other in self.members:
            if other.line is not None:
                other.line.send(kind="end", code=verdict.code, after=0.1 if other is member else _FAREWELL)
                go_on(other, self.me)
        if others:
            time.sleep(_FAREWELL if member is not self.me else 0.1)
        leave(verdict.code)


class Spoke(_Watch):
    """The other ranks': tells rank 0 of this worker, and ends it when rank 0 says so or is lost."""

    def __init__(
        self, me: Member, members: list[Member], key: bytes, timeout: float, addresses: Sequence[tuple[str, int]]
    ) -> None:
        super().__init__(me, members, key, timeout)
        self._addresses = addresses
        self._hub = members[0]
        self._deputies = _deputies(members)
        self._end_at: tuple[float, int] | None = None
        self._left = False

    def run(self) -> None:
        """Reach rank 0, then watch until the job is over."""
        line = reach(self._addresses, self.me.rank, self.key)
        if line is None:
            self.warn(f"can't reach rank 0 at {self._addresses}: this worker goes on unwatched.")
            self.over.set()
        else:
            self._hub.line, self._hub.heard = line, time.monotonic()
            self.selector.register(line.socket, selectors.EVENT_READ, self._heard)
        super().run()

    def _heard(self) -> None:
        line = self._hub.line
        if line is None:
            return
        try:
            messages = line.receive()
        except EOFError:
            self._hub.line = None
            self.drop(line)
            self._lost_hub()
            return
        now = self._hub.heard = time.monotonic()
        for message in messages:
            kind = message.get("kind")
            if kind == "beat" and isinstance(message.get("deputies"), list):
                self._deputies = message["deputies"]
            elif kind == "stack?":
                line.send(kind="stack", text=stacks())
            elif kind == "left":
                self._hub.left = str(message.get("how"))
            elif kind == "over":
                self.over.set()
            elif kind == "end" and self._end_at is None:
                code = message.get("code")
                mute()
                self._end_at = now + _seconds(message.get("after")), code if isinstance(code, int) else 1

    def _lost_hub(self) -> None:
        hub = self._hub
        if self._left:
            self.over.set()
        elif not hub.left and self._end_at is None:
            self._speak(hub.verdict("ended without a word: killed (kill -9, or out of memory) or crashed."))

    def _speak(self, verdict: Verdict) -> None:
        """End this worker on account of rank 0, and say so where it is for this worker to say."""
        if self.stopped_by_signal():
            leave(143)
        if self._missed_the_end():
            leave(1)
        if self.me.rank in self._deputies:
            time.sleep(self._deputies.index(self.me.rank))  # the second speaks only if the first has not ended it all
            self.report(verdict)
            go_on(self._hub, self.me)
            leave(verdict.code)
        self._end_at = time.monotonic() + _LAST, verdict.code

    def told(self, message: dict[str, Any]) -> None:
        """Take a message of this worker's main thread."""
        now = time.monotonic()
        self._look_at_myself(now)
        kind, hub = message["kind"], self._hub
        if self._end_at is not None:  # the job has failed; this is of no more interest
            return
        if hub.line is not None:
            hub.line.send(**message, **self._state(now))
            self._left = self._left or kind == "left"
        elif kind == "consequence" and hub.left:
            self._speak(hub.verdict(f"left early: it {hub.left}; {self.me.name} waited for it in {_waits(self.me)}."))
        elif kind in ("failure", "shared"):
            verdict = failure(self.me, message)
            self.report(verdict)
            leave(verdict.code)
        else:
            self.over.set()

    def _state(self, now: float) -> dict[str, Any]:
        me = self.me
        waits = {"waiting": me.waiting, "waiting_for": now - me.waiting_since} if me.waiting else {}
        return {"doing": me.doing, "doing_for": now - me.doing_since, "directory": me.directory, **waits}

    def beat_now(self, now: float) -> None:
        """Tell rank 0 that this worker lives, and what it does."""
        if self._hub.line is not None:
            self._hub.line.send(kind="beat", **self._state(now))

    def look(self, now: float) -> None:
        """End this worker when it is time, and look for rank 0's silence."""
        if self._end_at is not None and now >= self._end_at[0]:
            leave(self._end_at[1])
        hub = self._hub
        if not self.timeout or hub.line is None or hub.left or self._left:
            return
        silent = now - hub.heard
        # A beat later than rank 0 would end this worker, had it been the silent one.
        if silent > self.timeout + self.beat:
            state = process_state(hub.pid) if hub.host == self.me.host else ""
            cause = f"did not come: it gave no sign of life for {silent:.0f} s{state}"
            self._speak(hub.verdict(f"{cause}; {self.me.name} waited for it in {_waits(self.me)}."))
        elif silent > max(self.timeout / 5, 3 * self.beat):
            if not hub.warned and self.me.rank == self._deputies[0]:
                limit = f"the job ends after {self.timeout:g} s (--stall-timeout)"
                self.warn(f"no sign of life of {hub.name} for {silent:.0f} s; {limit}.")
            hub.warned = True
        else:
            hub.warned = False


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


def reach(addresses: Sequence[tuple[str, int]], rank: int, key: bytes) -> Line | None:
    """A connection to rank 0, the first that both sides prove themselves on."""
    for address in addresses:
        try:
            line = Line(socket.create_connection(address, timeout=_ANSWER))
        except OSError:
            continue
        try:
            challenge, own = _next(line)["challenge"], secrets.token_hex(16)
            line.send(rank=rank, proof=proof(key, "worker", str(rank), str(challenge)), challenge=own)
            if hmac.compare_digest(str(_next(line)["welcome"]).encode(), proof(key, "rank 0", own).encode()):
                line.known = True
                return line
        except (EOFError, KeyError):
            pass
        line.close()
    return None


def _next(line: Line) -> dict[str, Any]:
    """The next message, which comes alone."""
    end = time.monotonic() + 2 * _ANSWER
    while time.monotonic() < end:
        messages = line.receive()
        if messages:
            return messages[0]
    raise EOFError


def _deputies(members: Sequence[Member]) -> list[int]:
    """Who speaks when rank 0 is lost: the lowest rank that is there, and the lowest on another host."""
    there = [m for m in members[1:] if not m.left and (m.line is not None or members[0].line is None)]
    far = [m for m in there if m.host != members[0].host]
    return list(dict.fromkeys(m.rank for m in [*there[:1], *far[:1]])) or [1]


def _when(worker: Member | type[_Here]) -> str:
    """What a worker did, where a run tells it."""
    return f" when {worker.doing}" if worker.doing else ""


def _waits(worker: Member) -> str:
    """What a worker waits for: in a compiled step there is no telling but that it is the gradients' averaging."""
    gradients = "the gradients' averaging" if worker.doing.startswith("training") else "an operation of all"
    return (worker.waiting or gradients) + _when(worker)


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def stacks() -> str:
    """Where the Python code of this process stands: the main thread, and others that do not only wait for work."""
    frames = sys._current_frames()
    idle = ("threading.py", "queue.py", "selectors.py", "thread.py", "_monitor.py", "socket.py", "connection.py")
    parts = []
    for thread in sorted(threading.enumerate(), key=lambda t: t is not threading.main_thread()):
        frame = frames.get(thread.ident or 0)
        is_main = thread is threading.main_thread()
        if frame is None or thread is threading.current_thread():
            continue
        if is_main or not frame.f_code.co_filename.endswith(idle):
            lines = "".join(traceback.format_stack(frame)[-30:])
            parts.append(f"Stack of {'the main thread' if is_main else thread.name}, last call last:\n{lines}")
    return "".join(parts[:6])[-_MESSAGE // 4 :]


def go_on(member: Member, me: Member) -> None:
    """Wake a stopped worker on this host, which then sees that the job has ended; launchers take longer to kill it."""
    if member.host == me.host and "stopped" in process_state(member.pid):
        with contextlib.suppress(OSError):
            os.kill(member.pid, signal.SIGCONT)


def process_state(pid: int) -> str:
    """What the system says of a process on this host that is silent; begins with a colon, or is empty."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    words = {
        "T": "it is stopped (SIGSTOP)",
        "t": "it is held by a debugger",
        "D": "it waits for a disk or a network file system",
        "R": "it runs, in code that keeps Python's lock",
        "S": "it sleeps, in code that keeps Python's lock",
    }
    return f": {words[state]}" if state in words else ""


def oom_kills() -> dict[str, int]:
    """How often the system has killed for memory: in this process's cgroup, and on the whole host."""
    found = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2].lstrip("/")
        events = Path("/sys/fs/cgroup", group, "memory.events").read_text()
        found["its cgroup"] = int(dict(line.split() for line in events.splitlines())["oom_kill"])
    with contextlib.suppress(OSError, ValueError, KeyError):
        counters = Path("/proc/vmstat").read_text()
        found["its host"] = int(dict(line.split() for line in counters.splitlines())["oom_kill"])
    return found


def why_killed(before: dict[str, int]) -> str:
    """What the counts say since `before`; begins with a semicolon, or is empty."""
    now = oom_kills()
    places = [place for place in now if now[place] > before.get(place, now[place])]
    return f"; {places[0]} has just killed a process that ran out of memory" if places else ""


# --- a worker's side


def start(
    world: World,
    rank: int,
    size: int,
    hosts_alike: bool,
    gather: Callable[[Any], list[Any]],
    timeout: float,
    waits: bool,
) -> None:
    """Begin to watch; every worker of the job calls it.

    Args:
        world: this worker, within its group.
        rank: this worker's rank in the whole job.
        size: workers of the whole job.
        hosts_alike: all of them are on this host.
        gather: every worker's value, in rank order, over the whole job.
        timeout: `--stall-timeout`, in seconds; 0: no limit.
        waits: warn of operations that some do not come to, where Horovod itself does not.
    """
    global _watch
    _Here.world = world
    if size == 1 or os.environ.get("HOROVOD_ELASTIC") == "1":  # Horovod's elastic driver goes on without the lost
        return
    listener = listen(hosts_alike) if rank == 0 else None
    own: dict[str, Any] = {
        "member": (rank, world.name, world.rank, world.group, socket.gethostname(), os.getpid()),
        "key": secrets.token_bytes(16),
        "addresses": [] if listener is None else addresses(listener, hosts_alike),
    }
    found = gather(own)
    members = [Member(*worker["member"]) for worker in found]
    me, key = members[rank], found[0]["key"]
    if listener is not None:
        _watch = Hub(me, members, key, timeout, listener, waits)
    else:
        at = found[0]["addresses"]
        if me.host == members[0].host:
            at = [("127.0.0.1", at[0][1]), *(a for a in at if a[0] != "127.0.0.1")]
        _watch = Spoke(me, members, key, timeout, at)
    os.register_at_fork(after_in_child=_watch.close_in_child)
    _watch.hear_signals()
    _watch.start()


def listen(hosts_alike: bool) -> socket.socket:
    """A socket for the others to call: on the loopback interface where all of them are on this host."""
    if hosts_alike:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def addresses(listener: socket.socket, hosts_alike: bool) -> list[tuple[str, int]]:
    """Where the others may reach the listener, likely ones first."""
    port, name = listener.getsockname()[1], socket.gethostname()
    if hosts_alike:
        return [("127.0.0.1", port)]
    found = []
    try:
        import psutil  # Horovod needs it too

        for interface in psutil.net_if_addrs().values():
            found += [a.address for a in interface if a.family in (socket.AF_INET, socket.AF_INET6)]
    except ImportError:
        with contextlib.suppress(OSError):
            found = [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
    usable = [a for a in dict.fromkeys(found) if not a.startswith(("127.", "::1", "fe80"))]
    return [(a, port) for a in [*sorted(usable, key=lambda a: ":" in a), name]]


def stop() -> bool:
    """Say that this worker leaves by `stop()`.

    Returns:
        Whether it does leave: not while an exception passes, whose report is to end the job.
    """
    error = sys.exc_info()[1]
    if isinstance(error, Exception) or (isinstance(error, SystemExit) and error.code not in (None, 0)):
        return False
    if _watch is not None and _watch.alive:
        _watch.tell(kind="left", how=f"called stop(){_when(_Here)}")
        _Here.stopped = True
    return True


def leaving(error: BaseException | None) -> None:
    """Note with what the run is left: `sys.exit()` on one rank comes by no other way."""
    if isinstance(error, SystemExit):
        code = error.code
        _Here.exit_code = code if isinstance(code, int) else 0 if code is None else 1


def at_exit(shutdown: Callable[[], None]) -> None:
    """Say that this worker's script ends, where it did not call `stop()`, and give the others a moment to say why not.

    Args:
        shutdown: Horovod's, which makes those that wait for this worker fail.
    """
    watch = _watch
    if watch is None or not watch.alive or _Here.stopped:
        return
    if _Here.exit_code:
        cause = f"ended by sys.exit({_Here.exit_code}){_when(_Here)}."
        watch.tell(kind="failure", cause=cause, code=_Here.exit_code, exception=f"SystemExit: {_Here.exit_code}")
    else:
        watch.tell(kind="left", how=f"ended its script without stop(){_when(_Here)}")
        shutdown()
    watch.over.wait(_LAST)


def fail(error: BaseException, trace: str) -> None:
    """End the job on account of an uncaught exception; returns only where there is nobody to tell it to.

    Args:
        error: the exception.
        trace: its traceback, as text.
    """
    here, watch = _Here.world, _watch
    name = f"[{here.name}] "
    kind = type(error).__name__
    summary = f"{kind}: {error}".split("\n")[0].removesuffix(": ")
    told: dict[str, Any] = {"kind": "failure", "cause": f"failed{_when(_Here)}: {summary}"}
    told |= {"exception": f"{kind}: {error}", "traceback": trace[-_MESSAGE // 4 :], "code": 1}
    if isinstance(error, UsageError | RunFailed):
        shown = f"{name if here.rank > 0 or here.groups > 1 else ''}error: {error}"
        usage = isinstance(error, UsageError)
        told |= {"kind": "shared", "cause": f"failed: {error}", "shown": shown}
        told |= {"kept": not usage, "code": 2 if usage else 1}
    elif isinstance(error, KeyboardInterrupt):
        told |= {"cause": "interrupted", "shown": f"{name}interrupted", "kept": False, "code": 130}
    elif is_consequence(error):
        told |= {"kind": "consequence", "text": str(error)}
    if watch is not None and watch.alive:
        watch.tell(**told)
        watch.over.wait(2 * _SHARED if told["kind"] == "shared" else _ANSWER + 2 * _LAST)
    verdict = failure(Member(here.rank, here.name, here.rank, here.group, socket.gethostname(), os.getpid()), told)
    if here.size == here.groups == 1 and not verdict.shown:  # as without a launcher
        verdict = replace(verdict, shown=trace.rstrip("\n"))
    elif watch is None and verdict.shown and (here.rank > 0 or here.group > 0) and verdict.code < 100:
        time.sleep(_SHARED)  # what all ranks share is told once: rank 0's exit ends the others in this time
    say(verdict.text)
    verdict.write(_Here.directory)
    leave(verdict.code)

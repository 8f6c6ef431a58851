"""Watches over the workers of a job, so that it ends when one of them fails, vanishes or stalls, and says which.

Every worker has a thread that keeps a TCP connection to rank 0's; when rank 0 itself is lost, the lowest rank left
speaks. The thread goes on while the main thread waits in Horovod. Messages are JSON lines of limited length, between
workers that prove to each other that they know the job's random key.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.errors import RunFailed, UsageError
from toolkit.watching.diagnosis import LONGEST
from toolkit.watching.hub import Hub
from toolkit.watching.lines import ANSWER, addresses, cut, listen
from toolkit.watching.member import ALL_GROUPS, LAST, SHARED, Here, Member, Watch, failure, when
from toolkit.watching.spoke import Spoke
from toolkit.watching.verdict import FILE, in_one_line, is_consequence, leave, say
from toolkit.world import World

LEAVING = "the job's end"  # what a worker waits for that leaves: Horovod's shutdown, and MPI's, need all
_CAUSE = 2000  # characters of the line that says why
_watch: Watch | None = None


def belongs_to(world: World) -> None:
    """Name this worker in what it reports."""
    Here.world = world


def doing(text: str) -> None:
    """Note what this worker does now; costs an assignment."""
    Here.doing = text


class waiting:  # noqa: N801 - used like a function
    """Notes, in a `with` block, that this worker waits for all others, of its group or of all, in an operation."""

    def __init__(self, what: str, all_groups: bool = False) -> None:
        self._what = what + ALL_GROUPS if all_groups else what

    def __enter__(self) -> None:
        Here.waiting = (self._what, time.monotonic())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:  # else it is what the error's report tells
            Here.waiting = "", time.monotonic()


def directory(path: Path) -> None:
    """Where a failure's error.json belongs from now on; rank 0 removes an earlier one."""
    Here.directory = path.absolute()
    if Here.world.rank == 0:
        with contextlib.suppress(OSError):
            (path / FILE).unlink(missing_ok=True)


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
    Here.world, Here.stopped = world, False
    if _watch is not None:
        _watch.leave_signals()
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


def stop() -> bool:
    """Say that this worker leaves by `stop()`.

    Returns:
        Whether it does leave: not while an exception passes, whose report is to end the job.
    """
    error = sys.exc_info()[1]
    if isinstance(error, Exception) or (isinstance(error, SystemExit) and error.code not in (None, 0)):
        return False
    if _watch is not None and _watch.alive:
        _watch.tell(kind="left", how=f"called stop(){when(Here)}")
        Here.stopped = True
        _watch.leave_signals()
    return True


def leaving(error: BaseException | None) -> None:
    """Note with what the run is left: `sys.exit()` on one rank comes by no other way."""
    if isinstance(error, SystemExit):
        code = error.code
        Here.exit_code = code if isinstance(code, int) else 0 if code is None else 1


def at_exit(shutdown: Callable[[], None]) -> None:
    """Say that this worker's script ends, where it did not call `stop()`, and watch on until all have left.

    Args:
        shutdown: Horovod's, which makes those that wait for this worker fail.
    """
    watch = _watch
    if watch is None or not watch.alive:
        return
    with waiting(LEAVING):
        if Here.exit_code and not Here.stopped:
            cause = f"ended by sys.exit({Here.exit_code}){when(Here)}."
            watch.tell(kind="failure", cause=cause, code=Here.exit_code, exception=f"SystemExit: {Here.exit_code}")
        elif not Here.stopped:
            watch.tell(kind="left", how=f"ended its script without stop(){when(Here)}")
            shutdown()
        watch.over.wait()


def fail(error: BaseException, trace: str) -> None:
    """End the job on account of an uncaught exception; returns only where there is nobody to tell it to.

    Args:
        error: the exception.
        trace: its traceback, as text.
    """
    here, watch = Here.world, _watch
    name = f"[{here.name}] "
    kind = type(error).__name__
    text = cut(str(error), LONGEST)
    summary = cut(in_one_line(kind, text), _CAUSE)
    told: dict[str, Any] = {"kind": "failure", "cause": f"failed{when(Here)}: {summary}"}
    told |= {"exception": f"{kind}: {text}", "traceback": cut(trace, LONGEST), "code": 1}
    if isinstance(error, UsageError | RunFailed):
        shown = f"{name if here.rank > 0 or here.groups > 1 else ''}error: {text}"
        usage = isinstance(error, UsageError)
        told |= {"kind": "shared", "cause": f"failed: {cut(text, _CAUSE)}", "shown": shown}
        told |= {"kept": not usage, "code": 2 if usage else 1}
    elif isinstance(error, KeyboardInterrupt):
        told |= {"cause": "interrupted", "shown": f"{name}interrupted", "kept": False, "code": 130}
    elif is_consequence(error):
        told |= {"kind": "consequence", "text": cut(text, _CAUSE)}
    if watch is not None and watch.alive:
        watch.tell(**told)
        watch.over.wait(2 * SHARED if told["kind"] == "shared" else ANSWER + 2 * LAST)
    verdict = failure(Member(here.rank, here.name, here.rank, here.group, socket.gethostname(), os.getpid()), told)
    if here.size == here.groups == 1 and not verdict.shown:  # as without a launcher
        verdict = replace(verdict, shown=trace.rstrip("\n"))
    elif watch is None and verdict.shown and (here.rank > 0 or here.group > 0) and verdict.code < 100:
        time.sleep(SHARED)  # what all ranks share is told once: rank 0's exit ends the others in this time
    say(verdict.text)
    verdict.write(Here.directory)
    leave(verdict.code)

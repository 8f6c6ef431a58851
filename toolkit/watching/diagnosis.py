"""What can be known of a worker that does not come, or is gone: its Python stacks, its state, the system's counters."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

LONGEST = 1 << 18  # characters of a stack or traceback that is sent


def stacks() -> str:
    """Where the Python code of this process stands: the main thread, and others that do not only wait for work."""
    idle = (
        "threading.py",
        "queue.py",
        "selectors.py",
        "thread.py",
        "_monitor.py",
        "socket.py",
        "connection.py",
        "toolkit/stopping.py",
    )
    parts = []
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        if ident != threading.get_ident() and (ident == main or not frame.f_code.co_filename.endswith(idle)):
            # One that has no name is not Python's own: TensorFlow calls a generator of batches from there.
            name = "the main thread" if ident == main else names.get(ident, "a thread of the framework")
            lines = "".join(traceback.format_stack(frame)[-30:])
            parts.append(f"Stack of {name}, last call last:\n{lines}")
    return "".join(parts[:6])[-LONGEST:]


def go_on(pid: int) -> None:
    """Wake a stopped worker of this host, which then sees that the job has ended; launchers take longer to kill it."""
    if "stopped" in process_state(pid):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGCONT)


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

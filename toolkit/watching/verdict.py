"""What ended a job: who, on which host, why; as the last lines on the terminal and as the run's error.json."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from toolkit import ending
from toolkit.files import write_whole

FILE = "error.json"
_DISK = 1.0  # seconds that the end of the job waits for the disk
_WIDTH = 78  # covers what a progress bar left on the terminal's line
# What the ranks that go on see when another one has ended, by Horovod's own words and by those of Gloo below it.
_SHUT_DOWN = "Horovod has been shut down"
_DISCONNECTED = ("Connection reset by peer", "Connection closed by peer", "Broken pipe")


@dataclass(frozen=True)
class Verdict:
    """What ended the job.

    Attributes:
        cause: one line that follows the worker's name.
        name: the worker's, such as `rank 1 on node7`.
        rank: the worker's, within its group.
        host: the worker's.
        exception: type and text, where there was one.
        traceback: its.
        group: the worker's, where the job trains several models.
        stacks: workers' names to where their Python code stood.
        ranks: all ranks that the cause is about, where they are more than one.
        code: the exit code of all workers.
        time: UTC, ISO 8601.
        kept: whether error.json is written; not for what the user gave wrong or did.
        shown: what the terminal shows in place of all this.
    """

    cause: str
    name: str
    rank: int
    host: str
    exception: str | None = None
    traceback: str | None = None
    group: int = 0
    stacks: Mapping[str, str] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    code: int = 1
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="milliseconds"))
    kept: bool = True
    shown: str = ""

    @property
    def text(self) -> str:
        """The lines for the terminal: traceback and stacks, each line with its worker's name, then the cause."""
        if self.shown:
            return f"{self.shown}\n"
        lines = _prefixed(self.name, self.traceback or "")
        for name, stack in self.stacks.items():
            lines += _prefixed(name, stack)
        return "\n".join([*lines, f"[{self.name}] {self.cause}"]) + "\n"

    def write(self, *directories: Path | None, silence: float = 0.0) -> None:
        """Write error.json, whole or not at all, to the first of these that takes it; what hangs is not waited for.

        Args:
            directories: the run's, as far as known.
            silence: seconds for which this worker has heard nothing of the job's end. A file from that time stays: it
                may be this worker's host that was cut off from the others, and not from their disk.
        """
        content = {key: value for key, value in asdict(self).items() if key not in ("code", "kept", "shown")}
        text = json.dumps({**content, "exit_code": self.code}, indent=1).encode() + b"\n"

        def write() -> None:
            for directory in directories:
                with contextlib.suppress(OSError):  # a full or vanished disk: the terminal has it all
                    if directory is not None and directory.is_dir():
                        if not _is_from(directory / FILE, silence):
                            write_whole(directory / FILE, text)
                        break

        if self.kept:
            _within(_DISK, write)


def _is_from(file: Path, last: float) -> bool:
    """Whether a file was written in these last seconds."""
    return last > 0 and file.exists() and time.time() - file.stat().st_mtime < last


def is_consequence(error: BaseException | None) -> bool:
    """Whether an exception only tells that another worker has ended: of Horovod's, or raised while handling one.

    TensorFlow wraps Horovod's in errors of its own, so the text decides; an error that Horovod found in
    the operation itself, such as other shapes on other ranks, is none.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text, horovods = str(error), type(error).__name__ == "HorovodInternalError"
        if _SHUT_DOWN in text or (horovods and any(words in text for words in _DISCONNECTED)):
            return True
        error = error.__cause__ or error.__context__
    return False


def in_one_line(kind: str, text: str) -> str:
    """What an exception of this type and text says, in its first line.

    TensorFlow's of a compiled function begin with where it was, and hold what a Python function in it raised,
    such as one that loads data: there it is the last line that is not indented, before the nodes' names.
    """
    if text.startswith("Graph execution error:"):
        lines = [line for line in text.split("\n\t [[")[0].split("\n") if line[:1].strip()]
        return lines[-1] if re.match(r"[\w.]+: ", lines[-1]) else f"{kind}: {lines[-1]}"
    return f"{kind}: {text}".split("\n")[0].removesuffix(": ")


def say(text: str) -> None:
    """Write to standard error past Python's buffer, whose lock a stuck main thread may hold.

    For threads that tell of the main thread's trouble; `toolkit.progress.say` is for all else.

    Args:
        text: whole lines.
    """
    if sys.stdout is not None and sys.stdout.isatty() and _has_terminal():  # mpirun's pipes are terminals too
        text = "\n".join(line.ljust(_WIDTH) for line in text.split("\n")[:-1]) + "\n"
    data = text.encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def mute() -> None:
    """Let nothing more reach the terminal by standard error: Horovod's own threads write there as others end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def leave(code: int) -> None:
    """End this process now, without Horovod's and MPI's shutdown, which would wait for the other ranks."""

    ending.note(code)

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    _within(0.5, flush)
    os._exit(code)


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do what may hang, and go on without it after these seconds."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _prefixed(name: str, text: str) -> list[str]:
    return [f"[{name}] | {line}" for line in text.splitlines()]

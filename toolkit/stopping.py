"""SIGTERM and SIGINT as a wish to stop, as Slurm, Kubernetes and a person's Ctrl-C send them."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from toolkit import ending

_WISHES = (signal.SIGTERM, signal.SIGINT)
_TOGETHER = 1.0  # seconds in which a second signal is the first one's echo: a launcher's, or that of a process group
_HOROVODRUNS = "mpirun --allow-run-as-root --tag-output "  # how what `horovodrun --mpi` has a shell run begins
_LAUNCHERS = ("mpirun", "mpiexec", "orterun", "horovodrun", "srun")


class Signals:
    """Takes the first SIGTERM or SIGINT as a wish to stop; the next one ends the process at once.

    Signals are read by a thread of its own, so that the next one is heard also while the main thread waits for
    other ranks.

    Attributes:
        received: the number of the first signal; None before it.
    """

    _unanswered: int | None = None  # what came too late for the run that listened is the next one's

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._held = threading.local()  # the forking thread's own signal mask

    def install(self) -> None:
        """Begin to listen; does nothing outside of the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.received, Signals._unanswered = Signals._unanswered, None
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in _WISHES}
        self._wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._reading, self._writing = reading, writing
        # Until the child has forgotten, a signal to it would be heard here.
        os.register_at_fork(
            before=self._hold_signals, after_in_parent=self._let_signals, after_in_child=self._forget_in_child
        )
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()

    def restore(self, answered: bool = True) -> None:
        """Put the handlers from before back.

        Args:
            answered: what was received has had its effect; otherwise who listens next has received it.
        """
        if self._before:
            Signals._unanswered = None if answered else self.received
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}
            os.close(self._writing)  # which ends the thread

    def _listen(self, reading: int) -> None:
        first = 0.0
        shell = _horovodrun_shell()
        poll = select.poll()  # select() takes no descriptors from 1024 on
        poll.register(reading, select.POLLIN)
        while True:
            readable = poll.poll(1000 if shell and not self.received else None)
            numbers = os.read(reading, 64) if readable else b""
            if readable and not numbers:
                break
            if shell and not readable and not _is_child(*shell):
                numbers = bytes([signal.SIGTERM])
            if self._wakeup >= 0:  # someone else listens too
                with contextlib.suppress(OSError):
                    os.write(self._wakeup, numbers)
            for number in numbers:
                if number not in _WISHES:
                    continue
                if self.received is None:
                    self.received, first = number, time.monotonic()
                elif time.monotonic() - first > _TOGETHER:
                    ending.note(128 + number)
                    with contextlib.suppress(OSError):
                        os.write(2, b"a second signal: this worker ends at once, without a checkpoint\n")
                    os._exit(128 + number)
        os.close(reading)

    def _hold_signals(self) -> None:
        if self._before:
            self._held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WISHES)

    def _let_signals(self) -> None:
        mask = vars(self._held).pop("mask", None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _forget_in_child(self) -> None:
        """A data loader's process: Ctrl-C is its parent's matter, and SIGTERM ends it."""
        if self._before:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._before = {}
            os.close(self._reading)
            os.close(self._writing)  # or the thread would not see its parent close it
        self._let_signals()


@contextlib.contextmanager
def listening() -> Iterator[Signals]:
    """Take signals as wishes for as long as this lasts."""
    signals = Signals()
    signals.install()
    try:
        yield signals
    finally:
        signals.restore()


def resume_command(directory: Path, size: int) -> str:
    """The command line that goes on with the run in `directory`: the launcher's own where this host shows it.

    Args:
        directory: the run's.
        size: number of workers.
    """
    script = [Path(sys.executable).name, *sys.argv]
    words = script
    for process in _ancestors():
        for i, word in enumerate(process.words[:2]):  # a launcher in Python comes after its interpreter
            if _is_launch(line := [Path(word).name, *process.words[i + 1 :]]):
                words = line
                break
    if words[0] == "mpirun" and "-H" in words and _horovodrun_shell():  # it names every variable in its mpirun
        words = ["horovodrun", "--mpi", "-np", str(size), "-H", words[words.index("-H") + 1], *script]
    words = _without_values(words)
    if "KERAS_BACKEND" in os.environ:  # another one would make it another run
        words = [f"KERAS_BACKEND={os.environ['KERAS_BACKEND']}", *words]
    for flag in ("--resume",), ("--output", str(directory)):
        if not any(word == flag[0] or word.startswith(f"{flag[0]}=") for word in words):
            words = [*words, *flag]
    return shlex.join(words)


def _is_launch(line: list[str]) -> bool:
    return line[0] in _LAUNCHERS or (line[0] == "hvdkit" and line[1:2] in (["launch"], ["restart"]))


def _without_values(words: list[str]) -> list[str]:
    """A launcher's command line without the values of variables: what is printed may be kept and shown around.

    Open MPI's `-x NAME=value` becomes `-x NAME`, MPICH's `-genv NAME value` becomes `-genvlist NAME`.
    """
    end = words.index(sys.argv[0]) if sys.argv[0] in words else len(words)
    shown: list[str] = []
    rest = iter(words[:end])
    for word in rest:
        if word in ("-x", "--x"):
            shown += [word, next(rest, "").partition("=")[0]]
        elif word in ("-env", "-genv"):
            shown += [f"{word}list", next(rest, "")]
            next(rest, "")
        else:
            shown.append(word)
    return shown + words[end:]


class _Process(NamedTuple):
    number: int
    words: list[str]  # its command line


def _ancestors() -> Iterator[_Process]:
    """The parent of this process, its parent, and so on, as far as this host shows them."""
    number = os.getppid()
    while number > 1:
        try:
            yield _Process(number, _words(number))
            number = _parent(number)
        except (OSError, ValueError):
            return


def _words(number: int) -> list[str]:
    """A process' command line."""
    return [word.decode() for word in Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")[:-1]]


def _parent(number: int) -> int:
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])


def _is_horovodruns(words: list[str]) -> bool:
    """Whether this is the shell that `horovodrun --mpi` turns into."""
    return words[1:2] == ["-c"] and len(words) > 2 and words[2].startswith(_HOROVODRUNS)


def acting(number: int) -> int:
    """The process that a signal to a launcher is for: mpirun, where the launcher is `horovodrun --mpi`.

    That has turned into a shell, which SIGTERM would end alone, and which SIGINT does not reach.

    Args:
        number: the launcher's process number.
    """
    with contextlib.suppress(OSError, ValueError):
        if _is_horovodruns(_words(number)):
            others = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
            return next((other for other in others if _is_child(other, number)), number)
    return number


def _is_child(number: int, parent: int) -> bool:
    try:
        return _parent(number) == parent
    except (OSError, ValueError):
        return False


@functools.cache  # asked first when the listening begins: a shell that a signal has ended is not seen any more
def _horovodrun_shell() -> tuple[int, int] | None:
    """The process numbers of mpirun and of the shell that `horovodrun --mpi` turned into to start it.

    A signal to that shell ends it alone, and mpirun would go on without end.
    """
    below = None
    for process in _ancestors():
        if below and Path(below.words[0]).name == "mpirun" and _is_horovodruns(process.words):
            return below.number, process.number
        below = process
    return None

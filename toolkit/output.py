"""A run's directory: found or made, and its metrics.jsonl."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from toolkit import checkpoint
from toolkit.adapters import Adapter
from toolkit.claim import LOCK, Claim, claim_patiently
from toolkit.errors import UsageError
from toolkit.files import remove_leftovers, write_whole
from toolkit.progress import say
from toolkit.watching.verdict import FILE
from toolkit.world import World

_RUNS = Path("runs")
_METRICS = "metrics.jsonl"
_LONGEST_ROW = 1 << 20  # bytes; a row takes hundreds
_RETRY_SECONDS = 5.0  # between attempts to write rows that could not be written
_DISK_SECONDS, _WARN_SECONDS = 0.5, 30.0  # the disk's, until the ranks tell each other, and until they tell the user
T = TypeVar("T")


def decided_by_rank_0(world: World, adapter: Adapter, decide: Callable[[], T], all_groups: bool = False) -> T:
    """What `decide` returns on rank 0, on every rank; it alone looks at the disk.

    The others wait in one short operation after another, so that a slow disk is not taken for a stall.

    Args:
        world: what `start` returned.
        adapter: the adapter in use.
        decide: called on rank 0 alone, in another thread; gives anything that pickles.
        all_groups: rank 0 of the whole job decides, for all groups.

    Raises:
        UsageError: `decide` raised it, or an `OSError`; on every rank. Anything else that it raises, such as
            `RunFailed`, is raised on rank 0 alone, whose end is then the job's.
    """
    pending, thread, began = None, ThreadPoolExecutor(1, "disk"), time.monotonic()
    if world.rank == 0 and not (all_groups and world.group > 0):
        pending = thread.submit(_answer, decide)
    thread.shutdown(wait=False)
    warned = done = False
    while not done:
        if pending is not None:
            done = bool(wait([pending], timeout=_DISK_SECONDS).done)
        done, answer = adapter.gather((done, pending.result() if pending and done else None), all_groups=all_groups)[0]
        if pending is not None and not warned and time.monotonic() - began > _WARN_SECONDS:
            warned = True
            say(f"[{world.name}] warning: a slow disk: all ranks wait for it")
    if isinstance(answer, UsageError):
        raise answer
    return answer


def _answer(decide: Callable[[], Any]) -> Any:
    try:
        return decide()
    except UsageError as error:
        return error
    except OSError as error:
        return UsageError(f"{error.filename}: {checkpoint.reason(error)}: give another --output, or make it usable.")


def choose(name: str, output: Path | None, resume: bool) -> Path:
    """The directory of a run: an empty one, or with `resume` the run's that is there.

    Args:
        name: the script's; without `output` the directory is `runs/<name>-001`, with the next free
            number, or with `resume` the last one.
        output: what the user named.
        resume: go on with the run that is there.

    Raises:
        UsageError: the directory holds another run, can't be made, or there is none to resume.
    """
    numbers = [p.name.removeprefix(f"{name}-") for p in _RUNS.glob(f"{name}-[0-9]*") if p.is_dir()]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    if resume:
        directory = output or (_RUNS / f"{name}-{last:03d}" if last else None)
        if directory is None:
            raise UsageError(f"--resume found no run of {name} under {_RUNS}/: name one with --output.")
        if not directory.is_dir():
            raise UsageError(
                f"--resume found no run in {directory}, which is no directory: name a run's with --output."
            )
        return directory
    if output is None:
        return _new_directory(name, last + 1)
    try:
        if output.exists() and (not output.is_dir() or _entries(output)):
            for place in (output, *output.glob("fold-*")):  # that a run is at work there is the better reason
                if (place / LOCK).exists():
                    _hold(place).release()
            raise _taken(output)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output} can't be made: {error.strerror}.") from None
    return output


def claim(directory: Path, resume: bool, patience: float = 0) -> Claim:
    """Take a run's directory for this process, and clean up after killed runs.

    Args:
        directory: exists; a new run's is empty.
        resume: it is not a new run's.
        patience: seconds to wait for the end of a run that has it.

    Raises:
        UsageError: another run has it, it can't be written to, or it is not empty.
    """
    held = _hold(directory, patience)
    if not resume and _entries(directory):
        held.release()
        raise _taken(directory)
    if held.locked:  # or they might be another's that is at work
        checkpoint.remove_leftovers(directory)
        remove_leftovers(directory)
    return held


def _hold(directory: Path, patience: float = 0) -> Claim:
    try:
        return claim_patiently(directory, patience)
    except OSError as error:
        if error.errno == errno.EBUSY:
            text = f"{checkpoint.reason(error)}: wait for that run, or end it, or choose"
        else:
            text = f"it can't be written to ({checkpoint.reason(error)}): make it writable, or choose"
        raise UsageError(f"{directory}: {text} another --output.") from None


def _taken(place: Path) -> UsageError:
    """Why no new run can have a place, and what it is: --resume helps with a run alone."""
    if not place.is_dir():
        return UsageError(f"{place} is a file: give --output a directory that is empty, or not there yet.")
    others = sorted(set(_entries(place)) - {FILE})  # of a run that failed before its first row
    if others and not (checkpoint.steps(place) or (place / _METRICS).exists() or any(place.glob("fold-*"))):
        return UsageError(
            f"{place} is not an empty directory, and no run's (it has {ascii(others[0])}): choose another --output."
        )
    return UsageError(f"{place} is not an empty directory, but a run's: choose another --output, or add --resume.")


def _entries(directory: Path) -> list[str]:
    """What a directory holds beside a lock; one that another run has right now is refused by `claim`."""
    return [name for name in os.listdir(directory) if name != LOCK]


def to_resume(directory: Path) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint of a run; None where it was ended before its first, and can begin anew.

    Raises:
        UsageError: there are damaged ones only, or the directory is none of a run.
    """
    saved = checkpoint.steps(directory)
    found, damages = checkpoint.newest_whole(saved)
    for damage in damages:
        say(f"warning: damaged checkpoint passed over: {damage}")
    if found is None and any(directory.glob("fold-*")):
        raise UsageError(f"{directory} is of a cross-validation: add --folds, or name one of its fold-… with --output.")
    others = set(_entries(directory)) - {FILE}  # of a run that failed before its first row
    if found is None and (saved or (others and not (directory / _METRICS).exists())):
        raise UsageError(f"--resume found no whole checkpoint in {directory}: choose another --output to begin anew.")
    if found is None and read_metrics(directory, "epoch"):  # its checkpoints may lie elsewhere by now
        _put_aside(directory / _METRICS)
    return found


class Metrics:
    """The rows of metrics.jsonl, one JSON object a line; those that can't be written wait until they can.

    Args:
        directory: the run's.
        step: rows after this step, which a resumed run writes again, are removed.
        prepare: called before each attempt to write; may raise `OSError`.
    """

    def __init__(self, directory: Path, step: int, prepare: Callable[[], None] = lambda: None) -> None:
        self._path, self._step, self._prepare = directory / _METRICS, step, prepare
        self._file = -1
        self._end = 0  # of the file's whole rows, in bytes
        self._waiting: list[bytes] = []
        self._failed_at: float | None = None
        self._try()

    def write(self, kind: str, *rows: dict[str, Any]) -> None:
        """Add rows, and give them to the operating system, or keep them until that takes them."""
        self._waiting += [json.dumps({"kind": kind, **row}).encode() + b"\n" for row in rows]
        if self._failed_at is None or time.monotonic() - self._failed_at >= _RETRY_SECONDS:
            self._try()

    def close(self) -> None:
        """Close the file, after a last attempt to write what waits."""
        self._try()
        if self._waiting:
            say(f"warning: {len(self._waiting)} row(s) of {self._path} are lost: they could not be written to the end")
        self._file = _close(self._file)

    def _try(self) -> None:
        try:
            self._prepare()
            self._open()
            rows = b"".join(self._waiting)
            written = 0
            while written < len(rows):
                written += os.write(self._file, rows[written:])
        except OSError as error:
            if self._failed_at is None:
                reason = checkpoint.reason(error)
                say(
                    f"warning: {self._path} could not be written: {reason}; training goes on, rows wait until it can be"
                )
            self._failed_at = time.monotonic()
            with contextlib.suppress(OSError):  # of a row that fits in part, nothing stays
                os.ftruncate(self._file, self._end)
            return
        self._waiting.clear()
        self._end += len(rows)
        if self._failed_at is not None:
            say(f"{self._path} can be written again; no row is lost")
        self._failed_at = None

    def _open(self) -> None:
        """Open the file where it is not open or no longer there; of one that was removed all rows are written again."""
        if self._file >= 0:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                    return
                _put_aside(self._path)  # someone's new file of this name
            with contextlib.suppress(OSError):  # such as a network file system's, on which it is gone at once
                self._waiting.insert(0, os.pread(self._file, self._end, 0))
            self._file, self._step = _close(self._file), 0
        keep = b"".join(line for line, row in _rows(self._path) if _step_of(row) <= self._step)
        if not _begins_with(self._path, keep):  # a row in between is not whole: write the others anew
            write_whole(self._path, keep)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._file, self._end = os.open(self._path, flags, 0o644), len(keep)
        os.ftruncate(self._file, self._end)


def read_metrics(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind, `step` or `epoch`, that a run has written; those left unfinished are skipped."""
    return [row for _, row in _rows(directory / _METRICS) if row is not None and row.get("kind") == kind]


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """A file's lines as they are and as rows, None where it is none; nothing where there is no plain file."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with open(opened, "rb") as file:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(errno.EINVAL, "no plain file", str(path))
        begins = True  # whether this piece is a line's first
        while line := file.readline(_LONGEST_ROW):
            ends = line.endswith(b"\n")
            yield line, _row(line) if begins and ends else None
            begins = ends


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # such as one that a killed run left unfinished
        return None
    return row if isinstance(row, dict) else None


def _step_of(row: dict[str, Any] | None) -> float:
    step = math.inf if row is None else row.get("step")
    return step if isinstance(step, int | float) and step >= 0 else math.inf


def _begins_with(path: Path, content: bytes) -> bool:
    """Whether a file begins so; one that is missing, with nothing."""
    try:
        with open(path, "rb") as file:
            return file.read(len(content)) == content
    except FileNotFoundError:
        return not content


def _put_aside(path: Path) -> None:
    path.rename(f"{path}.replaced-{time.time_ns()}")


def _close(descriptor: int) -> int:
    if descriptor >= 0:
        os.close(descriptor)
    return -1


def _new_directory(name: str, number: int) -> Path:
    """Make `runs/<name>-<number>`, or with the next number that no other run takes meanwhile."""
    while True:
        directory = _RUNS / f"{name}-{number:03d}"
        try:
            directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UsageError(f"{directory} can't be made: {error.strerror}; name another with --output.") from None

"""A run's hold on its directory: one run at a time, by a lock that the kernel releases when the run is gone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from toolkit.progress import say

LOCK = "run.lock"
PATIENCE = 120.0  # seconds for a lost run's lock to go: on NFS that of a host that died lives on for about 90
# What flock says on a file system that has no locks, such as some network ones.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_held: set[int] = set()  # descriptors that a forked child must not keep: it would hold the lock beyond this process


class Claim:
    """This process's hold on a directory; from its making to `release` or the end of the process.

    Args:
        directory: exists.

    Attributes:
        locked: False where the file system has no locks, of which a warning was printed.

    Raises:
        OSError: EBUSY: another run has it, which the text names by process, host and time; or the lock can't
            be made, as in a read-only directory.
    """

    def __init__(self, directory: Path) -> None:
        _close_in_children()
        self._path, self._mutex, self.locked = directory, threading.Lock(), True
        self._directory = self._lock = -1
        self._enter()

    def check(self) -> None:
        """See to it that the directory is this run's: make it again where it was removed.

        Raises:
            OSError: it can't be made, or something else has taken its place; nothing there is touched.
        """
        with self._mutex:
            if not _is(self._path, None, self._directory):
                self._make_again()
            elif self.locked and not _is(LOCK, self._directory, self._lock):  # someone has removed the file alone
                self._take_lock()

    def release(self) -> None:
        """Give the directory up."""
        with self._mutex:
            if self.locked:
                with contextlib.suppress(OSError):
                    if _is(LOCK, self._directory, self._lock):
                        os.unlink(LOCK, dir_fd=self._directory)
            self._lock, self._directory = _close(self._lock), _close(self._directory)

    def _make_again(self) -> None:
        # Where a disk was unmounted, what is made would lie on the one below its place.
        place = next(path for path in (self._path.absolute(), *self._path.absolute().parents) if path.exists())
        if place.stat().st_dev != os.fstat(self._directory).st_dev:
            raise OSError(errno.ENODEV, "the directory is gone, and its place is on another disk", str(self._path))
        try:
            self._path.mkdir(parents=True)
        except FileExistsError:
            if not self._path.is_dir() or os.listdir(self._path):
                raise OSError(errno.EEXIST, "something else is there now", str(self._path)) from None
        self._enter()

    def _enter(self) -> None:
        opened = _keep(os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        # Kept open, its number can't become another directory's.
        self._directory, before = opened, self._directory
        try:
            self._take_lock()
        except OSError:
            self._directory = before
            _close(opened)
            raise
        _close(before)

    def _take_lock(self) -> None:
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            opened = _keep(os.open(LOCK, flags, 0o644, dir_fd=self._directory))
            try:
                if not stat.S_ISREG(os.fstat(opened).st_mode):
                    raise OSError(errno.EINVAL, "no plain file", str(self._path / LOCK))
                self.locked = self._lock_file(opened)
                if _is(LOCK, self._directory, opened):
                    break
            except OSError:
                _close(opened)
                raise
            _close(opened)  # the run that had it has removed it meanwhile
        _close(self._lock)
        self._lock = opened
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            os.ftruncate(opened, 0)
            os.pwrite(opened, json.dumps(owner).encode(), 0)

    def _lock_file(self, opened: int) -> bool:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, f"another run has it, {_owner(opened)}", str(self._path)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(
                f"warning: the file system of {self._path} has no locks ({error.strerror}): "
                "see to it that no other run is started in this directory"
            )
            return False
        return True


def claim_patiently(directory: Path, seconds: float, given_up: Callable[[], bool] = lambda: False) -> Claim:
    """Claim a directory, where a run that has it ends in time.

    Args:
        directory: exists.
        seconds: how long to wait for that.
        given_up: whether to wait no more.

    Raises:
        OSError: as of `Claim`.
    """
    began, said = time.monotonic(), False
    while True:
        try:
            return Claim(directory)
        except OSError as error:
            left = began + seconds - time.monotonic()
            if error.errno != errno.EBUSY or left <= 0 or given_up():
                raise
            if not said:
                say(f"{directory}: {error.strerror}: waiting up to {seconds:.0f} s for its end")
            said = True
        time.sleep(min(left, 0.5))


def _owner(opened: int) -> str:
    """Who has the lock, as its file tells it; it is written just after the lock is taken."""
    for _ in range(10):
        try:
            found = json.loads(os.pread(opened, 4096, 0))
            process, host, since = int(found["process"]), str(found["host"])[:255], str(found["since"])[:40]
            if f"{host}{since}".isprintable():
                return f"process {process} on {host}, since {since}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        time.sleep(0.05)
    return f"of which its {LOCK} says nothing"


def _is(path: Path | str, directory: int | None, opened: int) -> bool:
    """Whether a path is still the file or directory that is open."""
    try:
        return os.path.samestat(os.stat(path, dir_fd=directory), os.fstat(opened))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _keep(descriptor: int) -> int:
    _held.add(descriptor)
    return descriptor


def _close(descriptor: int) -> int:
    if descriptor >= 0:
        _held.discard(descriptor)
        os.close(descriptor)
    return -1


@functools.cache
def _close_in_children() -> None:
    os.register_at_fork(after_in_child=lambda: [_close(descriptor) for descriptor in list(_held)])

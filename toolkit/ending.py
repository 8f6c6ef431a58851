"""What a job that ends tells `hvdkit restart` and `launch`, as launchers may hide its exit code: horovodrun with 1."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from types import TracebackType

# Ends that are no failures of the run: a user's mistake, told to stop.
FINAL = frozenset({2, 128 + signal.SIGINT, 128 + signal.SIGTERM})
HIDING = 1  # what horovodrun makes of any worker's exit code
FILE = "HVDKIT_EXIT_CODE_FILE"  # the environment variable that names it, on the launcher's host
_RECENT = 60.0  # seconds; of an elastic job a worker may have left long before the end


def note(code: int) -> None:
    """Note with what this worker ends, where someone on this host wants to know it and a launcher may hide it."""
    if code in (*FINAL, HIDING) and FILE in os.environ:
        with contextlib.suppress(OSError):  # another host has no such file
            opened = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                os.write(opened, f"{code}\n".encode())
            finally:
                os.close(opened)


class Notes:
    """A file for the notes of a command's workers, from entering to leaving.

    Attributes:
        environment: what the command needs in its own.
    """

    def __enter__(self) -> Notes:
        opened, self._path = tempfile.mkstemp(prefix="hvdkit-exit-code-")
        os.close(opened)
        self.environment = {FILE: self._path}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def clear(self) -> None:
        """Forget all, before a start."""
        with contextlib.suppress(OSError):
            os.truncate(self._path, 0)

    def unhidden(self, code: int, told: int | None) -> int:
        """A command's exit code, or what a worker has noted where the launcher may have hidden that.

        Args:
            code: the command's.
            told: the first signal that it was sent, if any: launchers may kill workers before these note anything, and
                mpirun sends them SIGTERM, whatever it gets.
        """
        if code != HIDING:
            return code
        last = self.last()
        if told is not None and last in (None, 128 + signal.SIGTERM):
            return 128 + told
        return last or code

    def last(self) -> int | None:
        """What a worker that has just ended has noted."""
        try:
            with open(self._path, "rb") as file:
                codes = [int(line) for line in file.read(1 << 20).split()]
                late = time.time() - os.fstat(file.fileno()).st_mtime < _RECENT
        except (OSError, ValueError):
            return None
        return codes[-1] if codes and late else None

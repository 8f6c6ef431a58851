"""Run a launch command, and hand on to it the signals that end jobs; workers take them in `toolkit.stopping`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from toolkit.errors import UsageError
from toolkit.stopping import acting


class ForwardedSignals:
    """Hands on the signals that end jobs to the command that runs, as the launchers do to their workers."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._to_hand_on: list[int] = []
        self.number: int | None = None  # of the first signal that has come

    def __enter__(self) -> ForwardedSignals:
        kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._before = {kind: signal.signal(kind, self._hand_on) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    @property
    def told(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def was_told_within(self, seconds: float) -> bool:
        """Whether a signal has come by then."""
        end = time.monotonic() + seconds
        while not self.told and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.told

    def follow(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a command to its end; its exit code, as a shell gives it.

        Raises:
            UsageError: it can't be started.
        """
        try:
            # A session of its own: a terminal's Ctrl-C would reach it twice, and a second signal ends at once.
            self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        except OSError as error:
            raise UsageError(f"{command[0]} can't be run ({error.strerror}): give a command that runs.") from None
        self._send()
        code = self._process.wait()
        self._process = None
        return 128 - code if code < 0 else code

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self._to_hand_on.append(number)
        self._send()

    def _send(self) -> None:
        """Hand on what has come; what comes while the command is being started waits until it is."""
        while self._process is not None and self._to_hand_on:
            with contextlib.suppress(ProcessLookupError):
                os.kill(acting(self._process.pid), self._to_hand_on.pop(0))

"""Start a launch again, from its last checkpoint, when the run fails: what MPI can do in place of elastic mode."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from toolkit import checkpoint
from toolkit.errors import UsageError

_RESUME = "--resume"
# Not failures of the run: done, a user's mistake, told to stop.
_FINAL = {0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM}
_PAUSE = 1.0  # seconds before a start, for what the last one leaves: ports, GPU memory, a host's own restart


def add_to(commands: Any) -> None:
    """Add the command to what `argparse.ArgumentParser.add_subparsers` gave."""
    command = commands.add_parser(
        "restart",
        help="run a launch command, and again from its last checkpoint when the run fails",
        usage="hvdkit restart [--restarts N] -- mpirun -np 4 python recipes/cnn_torch.py --output DIR [its options]",
    )
    command.add_argument(
        "--restarts", default=3, type=int, metavar="N", help="how often to start it again at most (default: 3)"
    )
    command.add_argument("command", nargs="+", metavar="-- mpirun …", help="the launch command, with --output DIR")
    command.set_defaults(function=lambda options: run(options.command, options.restarts))


def run(command: Sequence[str], restarts: int) -> int:
    """Run a launch command; when the run fails, start it again from its last checkpoint.

    A run that is resumed is the undisturbed one to the bit, so one that was started again is too. One without a
    checkpoint begins anew; what it wrote is moved aside. SIGTERM, SIGINT and SIGHUP go on to the command, and then
    it is not started again.

    Args:
        command: of a script that trains through `toolkit.run.Run`, with its `--output`.
        restarts: how often to start it again at most, ≥ 0.

    Returns:
        The command's last exit code; 128 and the signal's number where a signal ended it.

    Raises:
        UsageError: the command has no `--output`, can't be started, or `restarts` is below 0.
    """
    if restarts < 0:
        raise UsageError(f"--restarts is {restarts}: give 0 or more.")
    directory, given = _output(command), list(command)
    with _Signals() as signals:
        for restart in range(1, restarts + 2):
            code = signals.follow(given)
            if code in _FINAL or restart > restarts or signals.was_told_within(_PAUSE):
                break
            given, begin = _again(command, directory)
            print(
                f"hvdkit: the run ended with exit code {code}: restart {restart} of {restarts}, {begin}",
                file=sys.stderr,
                flush=True,
            )
    return code


class _Signals:
    """Hands on the signals that end jobs to the command that runs, as the launchers do to their workers."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._told = threading.Event()

    def __enter__(self) -> _Signals:
        kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._before = {kind: signal.signal(kind, self._hand_on) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    @property
    def told(self) -> bool:
        """Whether a signal has come."""
        return self._told.is_set()

    def was_told_within(self, seconds: float) -> bool:
        """Whether a signal has come by then."""
        end = time.monotonic() + seconds
        while not self.told and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.told

    def follow(self, command: list[str]) -> int:
        """Run a command to its end; its exit code, as a shell gives it."""
        try:
            # A session of its own: a terminal's Ctrl-C would reach it twice, and a second signal ends at once.
            self._process = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            raise UsageError(f"{command[0]} can't be run ({error.strerror}): give a command that runs.") from None
        code = self._process.wait()
        self._process = None
        return 128 - code if code < 0 else code

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._told.set()
        if self._process is not None:
            self._process.send_signal(number)


def _output(command: Sequence[str]) -> Path:
    """The run's directory, as the last `--output` of the command has it."""
    given = None
    for part, following in zip(command, [*command[1:], None], strict=True):
        if part == "--output":
            given = following
        elif part.startswith("--output="):
            given = part.removeprefix("--output=")
    if not given or given.startswith("--"):
        raise UsageError(
            "the command has no --output DIR, in which a restart would look for the last checkpoint: add one to the "
            f"script's options: {shlex.join(command)} --output runs/mine"
        )
    return Path(given)


def _again(command: Sequence[str], directory: Path) -> tuple[list[str], str]:
    """The command that goes on with the run, and from where; of one without a checkpoint, that begins it anew."""
    found, _ = checkpoint.newest_whole(checkpoint.steps(directory))
    if found is not None or any(checkpoint.steps(fold) for fold in directory.glob("fold-*")):
        resume = [] if _RESUME in command else [_RESUME]
        return [*command, *resume], f"from {found.path if found else directory}"
    aside = ""
    if directory.is_dir() and any(directory.iterdir()):
        kept = directory.rename(directory.with_name(f"{directory.name}.failed-{time.time_ns()}"))
        aside = f", as there is no whole checkpoint in what is now {kept}"
    return [part for part in command if part != _RESUME], f"from the beginning{aside}"

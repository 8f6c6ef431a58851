"""Start a launch again, from its last checkpoint, when the run fails: what MPI can do in place of elastic mode."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit import checkpoint, output
from toolkit.claim import LOCK, PATIENCE, claim_patiently
from toolkit.ending import FINAL, Notes
from toolkit.errors import UsageError
from toolkit.forwarding import ForwardedSignals

_RESUME = "--resume"
_PAUSE = 1.0  # seconds before a start, for what the last one leaves: ports, GPU memory, a host's own restart


def add_to(commands: Any) -> None:
    """Add the command to what `argparse.ArgumentParser.add_subparsers` gave."""
    command = commands.add_parser(
        "restart",
        help="run a launch command, and again with --resume when the run fails (not on exit code 0, 2, 130, 143)",
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
    checkpoint begins anew. SIGTERM, SIGINT and SIGHUP go on to the command, and then it is not started again.

    Args:
        command: of a script that trains through `toolkit.run.Run`, with its `--output`.
        restarts: how often to start it again at most, ≥ 0.

    Returns:
        The command's last exit code; 128 and the signal's number where a signal ended it. Where that is 1, what a
        worker has noted, or else 128 and the number of a signal that was handed on.

    Raises:
        UsageError: the command has no `--output`, or one that is not empty and no `--resume`; it can't be started;
            or `restarts` is below 0.
    """
    if restarts < 0:
        raise UsageError(f"--restarts is {restarts}: give 0 or more.")
    directory, given = _output(command), list(command)
    if _RESUME not in command and directory.exists():
        output.choose("", directory, resume=False)  # or a restart would resume what the first start refuses
    with ForwardedSignals() as signals, Notes() as notes:
        for restart in range(1, restarts + 2):
            notes.clear()
            code = notes.unhidden(signals.follow(given, {**os.environ, **notes.environment}), signals.number)
            if code in {0, *FINAL} or restart > restarts or signals.was_told_within(_PAUSE):
                break
            _wait_for_locks(directory, signals)
            if signals.told:
                break
            given, begin = _again(command, directory)
            print(
                f"hvdkit: the run ended with exit code {code}: restart {restart} of {restarts}, {begin}",
                file=sys.stderr,
                flush=True,
            )
    return code


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


def _wait_for_locks(directory: Path, signals: ForwardedSignals) -> None:
    """Wait for what the last start left: orphans that are about to end, and on NFS a dead host's lock."""
    end = time.monotonic() + PATIENCE
    for place in (directory, *directory.glob("fold-*")):
        if (place / LOCK).exists():
            with contextlib.suppress(OSError):  # who has it still is told by the next start, which it refuses
                claim_patiently(place, end - time.monotonic(), lambda: signals.told).release()


def _again(command: Sequence[str], directory: Path) -> tuple[list[str], str]:
    """The command that goes on with the run, or begins it anew where it has no checkpoint; and from where, in words."""
    if not directory.is_dir():  # it failed before it made one
        return list(command), "from the beginning"
    saved = checkpoint.steps(directory)
    found, _ = checkpoint.newest_whole(saved)
    folds = any(checkpoint.steps(fold) for fold in directory.glob("fold-*"))
    begin = f"from {found.path if found else directory}" if saved or folds else "from the beginning"
    return [*command, *([] if _RESUME in command else [_RESUME])], begin

"""Rank 0's progress bar and lines on the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

from toolkit.world import World

_WIDTH = 78


def say(line: str, file: TextIO | None = None) -> None:
    """Write a line for the user, to standard error unless told otherwise.

    In one write, as others write there too, and a launcher may put a tag before each piece that it reads. Where it
    goes to a disk that is full, a terminal that was hung up or a launcher that has gone, training goes on without it.
    """
    file = file or sys.stderr
    with contextlib.suppress(OSError):
        file.write(line + "\n")
        file.flush()


class Progress:
    """A bar of steps where there is a terminal, and lines on standard output everywhere.

    Under a launcher a worker's standard output is the launcher's pipe, so the bar is drawn on the
    controlling terminal itself. It leaves the cursor at the line's start, and lines are padded
    over it, since they come by another way and may arrive in between.

    Args:
        world: ranks above 0 draw and print nothing.
        total: steps of the whole run.
        done: steps taken already.
        prefix: stands before each line.
    """

    def __init__(self, world: World, total: int, done: int, prefix: str = "") -> None:
        self._rank = world.rank
        self._prefix = prefix
        self._terminal = _terminal() if world.rank == world.group == 0 else None
        self._bar: Any = None
        if self._terminal is not None:
            self._bar = tqdm(
                total=total,
                initial=done,
                file=_AtLineStart(self._terminal),
                ncols=_WIDTH,
                leave=False,
                unit="step",
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
            )

    def advance(self, epoch: int) -> None:
        """One step was taken, in the epoch of this number (from 0)."""
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {epoch + 1}", refresh=False)
            self._bar.update()

    def line(self, text: str) -> None:
        """Print a line on rank 0."""
        if self._rank != 0:
            return
        text = self._prefix + text
        if self._bar is not None:
            self._bar.clear()
        say(text.ljust(_WIDTH) if self._bar is not None else text, sys.stdout)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._terminal is not None:
            with contextlib.suppress(OSError):
                self._terminal.close()
            self._terminal = None


class _AtLineStart:
    """A text file for tqdm that returns the cursor to the line's start after each write."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was hung up
            self._file.write(text + "\r")

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()


def _terminal() -> TextIO | None:
    if not sys.stdout.isatty():
        return None
    try:
        return os.fdopen(os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY), "w", encoding="utf-8")
    except OSError:
        return None

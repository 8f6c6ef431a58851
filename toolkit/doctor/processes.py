"""Run programs with a time-out and in parallel, and leave none behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_GRACE = 5.0  # seconds for a launcher to end its ranks on other hosts


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        code: exit code; negative: minus the signal; None: it was ended, its time being up.
        out: standard output.
        err: standard error.
    """

    code: int | None
    out: str
    err: str


async def run(words: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a program to its end, without input.

    Args:
        words: program and arguments.
        seconds: after which it is ended with all that it started here.
        environment: its variables; None: this process's.

    Raises:
        OSError: it can't be started.
    """
    process = await asyncio.create_subprocess_exec(
        *words,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    said = asyncio.ensure_future(process.communicate())
    try:
        await asyncio.wait([said], timeout=seconds)
        late = not said.done()
    finally:
        await end(process)
    # A program that has left its group may hold the pipes open for ever.
    await asyncio.wait([said], timeout=_GRACE)
    out, err = said.result() if said.done() else (b"", b"")
    said.cancel()
    return Ended(None if late else process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


async def exited(process: asyncio.subprocess.Process, seconds: float) -> int | None:
    """A program's exit code once it has ended; None where that takes longer than these seconds."""
    until = time.monotonic() + seconds
    # Not process.wait(), which some Pythons let wait for the pipes too, and a child may hold those.
    while process.returncode is None and time.monotonic() < until:
        await asyncio.sleep(0.01)
    return process.returncode


async def end(process: asyncio.subprocess.Process) -> None:
    """End a program that leads a group, and what is left of the group."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await exited(process, _GRACE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)

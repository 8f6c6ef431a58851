"""A probe on one host, here or reached by ssh: started, and asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import secrets
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.doctor import probe, processes
from toolkit.doctor.checks import one_line

_LONGEST_LINE = 1 << 20  # bytes
_END = 5.0  # seconds for a probe to end that is told no more


class NoAnswer(Exception):
    """A probe did not answer, or not as probes do; its text says what came instead."""


class Ended(NoAnswer):
    """It ended instead, and its exit code may tell why."""


def understood(line: bytes, token: str) -> dict[str, Any] | None:
    """A probe's answer in a line of what the other host says; None for a line of something else, such as a greeting.

    A greeting may also stand before the answer, where its line was not ended.

    Raises:
        NoAnswer: the line has the token and is no answer.
    """
    _, marked, said = line.partition(token.encode())
    if not marked:
        return None
    try:
        answer = json.loads(said.decode())
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise NoAnswer(f"it answers {one_line(said.decode(errors='replace'), 80)!r}, which is not JSON")
    if "error" in answer:
        raise NoAnswer(f"its probe failed: {one_line(str(answer['error']))}")
    return answer


class Peer:
    """The probe on a host.

    Args:
        login: the words before the remote command, ssh with its options and the host; () for this machine.

    Attributes:
        token: stands before each of its answers, and tells its doors from other programs'.
        python: the version of the Python there, once it has begun.
    """

    def __init__(self, login: Sequence[str] = ()) -> None:
        self._login = login
        self.token = f"hvdkit-{secrets.token_hex(8)} "
        self._process: asyncio.subprocess.Process | None = None
        self._heard: list[str] = []
        self.python = ""

    async def begin(self) -> None:
        """Start the other Python, until it has told its version.

        Raises:
            NoAnswer: it did not start; `ended` then tells how.
            OSError: ssh can't be run.
        """
        words = [sys.executable, "-c", probe.START]
        if self._login:  # the other host's shell reads it
            words = [*self._login, "exec " + shlex.join(words)]
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *words,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            limit=_LONGEST_LINE,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        boot = f"TOKEN, ROUNDS = {self.token!r}, {probe.CLOCK_ROUNDS}\n{probe.BOOT}"
        self.python = str((await self.ask(boot)).get("python", ""))

    async def clock(self) -> tuple[float, float]:
        """Seconds by which the host's clock is ahead of this one's, and how far that may be off.

        As NTP does: the answer was made between asking and hearing, and the quickest of some rounds is the surest.

        Raises:
            NoAnswer: no answer, or one without a time.
        """
        rounds = []
        for _ in range(probe.CLOCK_ROUNDS):
            asked = time.time()
            told = (await self.ask("")).get("time")
            heard = time.time()
            if not isinstance(told, (int, float)) or not math.isfinite(told):
                raise NoAnswer("it does not tell the time")
            rounds.append(((heard - asked) / 2, told - (asked + heard) / 2))
        uncertainty, ahead = min(rounds)
        return ahead, uncertainty

    async def become_probe(self, environment: Mapping[str, str], directory: str, data_dir: str | None) -> dict:
        """Go on as the probe, with these variables; what it sees, in whatever form that is.

        Raises:
            NoAnswer: it sees nothing.
        """
        source = Path(probe.__file__).read_text(encoding="utf-8")
        job = {"environment": dict(environment), "directory": directory, "source": source}
        await self.ask(job)  # what is sent before it has begun, the Python before it would read
        facts = (await self.ask({"facts": [directory, data_dir]})).get("facts")
        if not isinstance(facts, dict):
            raise NoAnswer("it tells no facts")
        return facts

    async def ask(self, request: Any) -> dict[str, Any]:
        """The probe's answer to a request.

        Raises:
            NoAnswer: there is none.
        """
        await self._write(request)
        reader = self._running().stdout
        while reader is not None:
            try:
                line = await reader.readline()
            except ValueError:
                raise NoAnswer(f"it says a line of over {_LONGEST_LINE} bytes") from None
            if not line:
                break
            answer = understood(line, self.token)
            if answer is not None:
                return answer
            self._heard = [*self._heard[-20:], one_line(line.decode(errors="replace"))]
        raise Ended("it ended without an answer")

    async def _write(self, request: Any) -> None:
        writer = self._running().stdin
        if writer is not None:
            with contextlib.suppress(ConnectionError):  # then there is no answer either
                writer.write(json.dumps(request).encode() + b"\n")
                await writer.drain()

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise NoAnswer("it was not started")
        return self._process

    async def ended(self) -> tuple[int | None, str]:
        """Exit code and last words of a probe that is not wanted or has not answered."""
        process = self._running()
        if process.stdin is not None:
            process.stdin.close()
        code = await processes.exited(process, _END)
        said = b""
        if process.stderr is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                while piece := await asyncio.wait_for(process.stderr.read(1 << 16), 0.5):
                    said = (said + piece)[-_LONGEST_LINE:]
        await self.close()
        return code, "\n".join([*self._heard, said.decode(errors="replace")])

    async def close(self) -> None:
        """End the probe: it ends when nothing more can be asked, ssh with it."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        await processes.exited(process, _END / 5)
        await processes.end(process)
        with contextlib.suppress(asyncio.TimeoutError):  # reads the pipes to their ends, for asyncio to close them
            await asyncio.wait_for(process.communicate(), 0.5)

"""Contestants' processes, which take turns: while one trains, all threads of the others are stopped.

All are started once, meet this controller on a socket, and take the same first steps. So each turn is one of a process
that has warmed up, and the machine's own changes of speed meet all contestants alike.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tests.benchmarks import turns
from tests.launching import BIN, MARK, clean_environment, kill_marked, marked
from toolkit.tuning import usable_cores

SCRIPTS = Path(__file__).parent / "contestants"
START, ANSWER, END = 300.0, 600.0, 10.0  # seconds: to the first word, to each other, and to leave at the end
# Horovod's documentation gives this as what horovodrun runs (docs/mpi.rst); MPI then takes it that cores suffice.
MPIRUN = ["-bind-to", "none", "-map-by", "slot", "-mca", "pml", "ob1", "-mca", "btl", "^openib"]


class Failed(Exception):
    """A contestant can't go on; the text is its own last line of error."""


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        name: in tables.
        script: its file among `contestants`, with its arguments.
        launcher: mpirun, horovodrun, or none: the arena starts each rank, with what `env://` and TF_CONFIG ask for.
        environment: more variables.
        talks: its ranks are to hold the same weights.
    """

    name: str
    script: tuple[str, ...]
    launcher: str = "none"
    environment: Mapping[str, str] = field(default_factory=dict)
    talks: bool = True


class Job:
    """One contestant's processes on this machine; entered to start them, left to end them.

    Args:
        contestant: what to run.
        model: a key of `models.MODELS`.
        size: number of ranks.
        directory: for its output and temporary files.
    """

    def __init__(self, contestant: Contestant, model: str, size: int, directory: Path) -> None:
        self.contestant, self.model, self.size, self.directory = contestant, model, size, directory
        self.mark = f"bench-{os.getpid()}-{directory.name}"
        self.threads: list[int] = []
        self._pids: list[int] = []
        self._lines: list[IO[str]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._released = False

    def __enter__(self) -> Job:
        self.directory.mkdir()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.launched = time.time()
        try:
            for environment, command in self._commands():
                self._processes.append(self._start(environment, command))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._end()

    def _commands(self) -> Iterator[tuple[dict[str, str], list[str]]]:
        """The environment and command of each process to start here."""
        script, *arguments = self.contestant.script
        python = [sys.executable, str(SCRIPTS / script), *arguments]
        own = {
            **clean_environment(),
            **self.contestant.environment,
            MARK: self.mark,
            "TMPDIR": str(self.directory),
            turns.PORT: str(self._listener.getsockname()[1]),
            turns.MODEL: self.model,
            turns.THREADS: str(max(1, usable_cores() // self.size)),
            turns.DIRECTORY: str(self.directory),
        }
        if self.contestant.launcher == "mpirun":
            yield own, [str(BIN / "mpirun"), "-np", str(self.size), "-H", f"localhost:{self.size}", *MPIRUN, *python]
        elif self.contestant.launcher == "horovodrun":
            yield own, [str(BIN / "horovodrun"), "-np", str(self.size), "--mpi", *python]
        else:
            ports = _free_ports(self.size)
            for rank in range(self.size):
                told = {turns.RANK: str(rank), turns.SIZE: str(self.size)}
                yield {**own, **told, **_rendezvous(rank, self.size, ports)}, python

    def _start(self, environment: dict[str, str], command: list[str]) -> subprocess.Popen[bytes]:
        with (self.directory / "output").open("ab") as output:
            return subprocess.Popen(
                command,
                env=environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the controller, which then ends them
                preexec_fn=turns.die_with_parent,
            )

    def meet(self) -> None:
        """Wait until every rank is ready to train."""
        connections: dict[int, tuple[IO[str], int, int]] = {}
        end = time.monotonic() + START
        self._listener.settimeout(0.2)
        while len(connections) < self.size:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                connection.settimeout(ANSWER)
                lines = connection.makefile("rw", encoding="utf-8")
                said = json.loads(lines.readline() or "{}")
                if said:
                    connections[said["rank"]] = lines, said["pid"], said["threads"]
            if any(process.poll() is not None for process in self._processes):
                raise Failed(self._last_line())
            if time.monotonic() > end:
                raise Failed(f"{len(connections)} of {self.size} ranks were ready after {START:.0f} s")
        found = [connections[rank] for rank in sorted(connections)]
        self._lines, self._pids, self.threads = map(list, zip(*found, strict=True))

    def ask(self, **command: Any) -> list[dict[str, Any]]:
        """Tell all ranks something, and wait for their answers."""
        return self._ask_each([command] * self.size)

    def steps(self, count: int) -> list[dict[str, Any]]:
        """Have all ranks take steps, which they begin together."""
        self.ask(do="steps", steps=count)
        return self.ask(do="go")

    def weights(self, path: Path | None = None) -> list[dict[str, Any]]:
        """Each rank's hash of its weights, and its peak of memory in MiB; rank 0 writes its weights to `path`."""
        paths = [str(path) if path else None, *[None] * (self.size - 1)]
        return self._ask_each([{"do": "weights", "path": path} for path in paths])

    def turn(self, count: int) -> float:
        """The time that a step took the slowest rank, in seconds, over a turn of `count` steps."""
        self.resume()
        try:
            return max(answer["seconds"] for answer in self.steps(count)) / count
        finally:
            self.pause()

    def pause(self) -> None:
        """Stop all threads of all ranks."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _ask_each(self, commands: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        self._tell(commands)
        return self._answers()

    def _tell(self, commands: Sequence[dict[str, Any]]) -> None:
        try:
            for lines, command in zip(self._lines, commands, strict=False):  # none, where they did not meet
                lines.write(json.dumps(command) + "\n")
                lines.flush()
        except OSError as error:
            raise Failed(self._last_line()) from error

    def _answers(self) -> list[dict[str, Any]]:
        try:
            answers = [lines.readline() for lines in self._lines]
        except TimeoutError as error:
            raise Failed(f"no answer after {ANSWER:.0f} s") from error
        except OSError as error:
            raise Failed(self._last_line()) from error
        if not all(answers):
            time.sleep(1)  # the launcher has yet to say why
            raise Failed(self._last_line())
        return [json.loads(answer) for answer in answers]

    def _last_line(self) -> str:
        """What the contestant's output says of its failure: its last line of an error, or its last line."""
        lines = [line.strip() for line in (self.directory / "output").read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line.strip("-")]
        named = [line for line in lines if "rror: " in line or line.startswith("not built")]
        return (named or lines or ["it ended without a word"])[-1][:300]

    def release(self) -> None:
        """Have the ranks leave by themselves, as far as they can."""
        if not self._released:
            self._released = True
            self.resume()
            with contextlib.suppress(Failed):
                self._tell([{"do": "end"}] * self.size)

    def _end(self) -> None:
        """End all processes, and take down what they leave."""
        self.release()
        for lines in self._lines:
            with contextlib.suppress(OSError):
                lines.close()
        self._listener.close()
        _wait(self._processes, END if self._lines else 0)
        for process in self._processes:  # a launcher that is told to end takes its ranks and its files with it
            process.terminate()
        _wait(self._processes, END)
        kill_marked(self.mark)
        for process in self._processes:
            process.kill()
            process.wait()
        while marked(self.mark):
            kill_marked(self.mark)
        shutil.rmtree(self.directory, ignore_errors=True)


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, end - time.monotonic()))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


def _rendezvous(rank: int, size: int, ports: Sequence[int]) -> dict[str, str]:
    """What torch.distributed's env:// and TensorFlow's cluster resolver read."""
    workers = [f"127.0.0.1:{port}" for port in ports]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports[0]),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}),
    }


@dataclass
class Result:
    """What came of a contestant.

    Attributes:
        failed: its last line of error, where it did not come to the end.
        milliseconds_per_step: one for each counted round.
        steps_per_turn: steps over which each of these was measured.
        threads: compute threads of each rank, as the framework says.
        peak_megabytes: of memory, of each rank, in MiB.
        ranks_equal: all ranks held the same weights, after the first steps and after the last.
        weights: where rank 0's are, after the first steps.
        initial: and before them.
    """

    failed: str | None = None
    milliseconds_per_step: list[float] = field(default_factory=list)
    steps_per_turn: int = 0
    threads: list[int] = field(default_factory=list)
    peak_megabytes: list[float] = field(default_factory=list)
    ranks_equal: bool | None = None
    weights: Path | None = None
    initial: Path | None = None


def compete(
    contestants: Sequence[Contestant],
    model: str,
    size: int,
    *,
    rounds: int,
    turn_seconds: float,
    warm_steps: int,
    directory: Path,
    say: Callable[[str], None],
) -> dict[str, Result]:
    """Start all contestants, let them take turns, and end them.

    Args:
        contestants: who takes part.
        model: a key of `models.MODELS`.
        size: number of ranks of each.
        rounds: counted turns of each; one more comes before them.
        turn_seconds: how long a turn is to take, about.
        warm_steps: the first steps of each, after which rank 0's weights are written to `directory`.
        directory: exists; a directory below it belongs to each contestant while it runs.
        say: is given a line for each contestant that fails.
    """
    results = {contestant.name: Result() for contestant in contestants}
    jobs: dict[str, Job] = {}
    with contextlib.ExitStack() as all_jobs:

        def attempt(name: str, action: Callable[[Job, Result], None]) -> None:
            try:
                action(jobs[name], results[name])
            except Failed as failure:
                results[name].failed = str(failure)
                jobs.pop(name)._end()
                say(f"{name} failed: {failure}")

        for i, contestant in enumerate(contestants):
            jobs[contestant.name] = all_jobs.enter_context(Job(contestant, model, size, directory / f"c{i}"))
        for name in list(jobs):  # all load their frameworks at the same time
            attempt(name, _meet)
        for name in list(jobs):
            attempt(name, lambda job, result: _warm_up(job, result, warm_steps, directory))
        for name in list(jobs):
            attempt(name, lambda job, result: _choose_steps(job, result, turn_seconds))
        for number in range(rounds):
            order = list(jobs)
            random.Random(number).shuffle(order)
            for name in order:
                attempt(name, _take_turn)
        for name in list(jobs):
            attempt(name, _look_at_the_end)
        for job in jobs.values():  # at the same time
            job.release()
    return results


def _meet(job: Job, result: Result) -> None:
    job.meet()
    result.threads = job.threads
    job.pause()


def _warm_up(job: Job, result: Result, warm_steps: int, directory: Path) -> None:
    """The first steps; hash and keep the weights that they lead to."""
    job.resume()
    result.initial = directory / f"{job.directory.name}.initial"
    job.weights(result.initial)
    job.steps(warm_steps)
    result.weights = directory / f"{job.directory.name}.weights"
    result.ranks_equal = _alike(job.weights(result.weights))
    job.pause()


def _choose_steps(job: Job, result: Result, turn_seconds: float) -> None:
    """A turn that is not counted; find out how many steps make one."""
    few = max(2, round(turn_seconds / 4 / job.turn(2)))
    result.steps_per_turn = max(2, math.ceil(turn_seconds / job.turn(few)))


def _take_turn(job: Job, result: Result) -> None:
    result.milliseconds_per_step.append(1000 * job.turn(result.steps_per_turn))


def _look_at_the_end(job: Job, result: Result) -> None:
    job.resume()
    answers = job.weights()
    result.ranks_equal = bool(result.ranks_equal) and _alike(answers)
    result.peak_megabytes = [answer["peak_megabytes"] for answer in answers]
    job.pause()


def _alike(answers: Sequence[dict[str, Any]]) -> bool:
    return len({answer["digest"] for answer in answers}) == 1

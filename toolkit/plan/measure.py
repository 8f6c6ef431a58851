"""Measures what a plan is made of: a recipe's steps on one worker and its gradients, and the links between workers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import checkpoint, launch, step_times, verify
from toolkit.doctor import all_reduce, measure, processes
from toolkit.errors import UsageError
from toolkit.hostfile import Host
from toolkit.launch import Specification
from toolkit.plan.cost import Link
from toolkit.plan.schemes import Gradients
from toolkit.tuning import usable_cores

WARM_UP = 10  # steps
ROUNDS = 3  # runs of a link's measurement
_OWN = ("--output", "--max-steps", "--check-sync", "--resume", "--folds", "--checkpoint-steps")
_ENDLESS = "1000000"  # epochs


@dataclass(frozen=True)
class Spread:
    """A median, and the middle half of the values that it is of."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        ordered = sorted(values)
        quarter = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
        return cls(statistics.median(ordered), quarter[0], quarter[2])


@dataclass(frozen=True)
class Recipe:
    """What a recipe's run on one worker showed.

    Attributes:
        step: seconds.
        gradients: of its trainable tensors.
        samples: of a step.
        framework: whose Horovod it uses: torch or tensorflow.
        on_gpu: whether it computes on a GPU.
    """

    step: Spread
    gradients: Gradients
    samples: int
    framework: str
    on_gpu: bool


@dataclass(frozen=True)
class Between:
    """What messages between two workers showed.

    Attributes:
        link: α from single messages, or where mpi4py is missing from small all-reduces; β from a large all-reduce; and
            Horovod's agreement from what is left of a small one.
        all_reduce: seconds of a large all-reduce, `size` bytes.
        size: its bytes.
        small: seconds of an all-reduce of one number.
        reducer: horovod or mpi, the quicker one, as `reducer="auto"` takes it.
    """

    link: Link
    all_reduce: Spread
    size: int
    small: float
    reducer: str


def check_command(command: Sequence[str]) -> None:
    """Raise `UsageError` where a recipe's command has an option that the plan has to give itself."""
    given = {part.split("=")[0] for part in command}
    clash = [flag for flag in _OWN if flag in given]
    if clash:
        raise UsageError(f"the recipe's command has {clash[0]}: leave it out, plan needs it its own way.")


def recipe(
    command: Sequence[str],
    steps: int,
    workers: int,
    timeout: float,
    batch: int | None = None,
    look_for_frozen: bool = True,
) -> Recipe:
    """Run a recipe on one worker, while as many others as a host is to have keep it as busy as they will.

    Args:
        command: as its user types it for one worker.
        steps: to measure, after `WARM_UP`.
        workers: on this machine, ≥ 1.
        timeout: seconds for each run.
        batch: samples of a step in place of the command's.
        look_for_frozen: whether to look for tensors that steps leave alone, which takes one more run.

    Raises:
        UsageError: the command can't be started, is no recipe, or fails.
    """
    check_command(command)
    words = [*command, *([] if batch is None else ["--global-batch-size", str(batch)])]
    environment = _on_its_own(workers)
    with tempfile.TemporaryDirectory(prefix="hvdkit-plan-") as name:
        directory = Path(name)
        times = {step_times.VARIABLE: str(directory / "times")}
        before = None
        if look_for_frozen or (workers > 1 and batch is None):
            _run(words, directory / "before", 0, timeout, {**environment, **times})
            before = _newest(directory / "before") if look_for_frozen else None
            _check_companions(workers, step_times.read(directory / "times"))
        with _companions(words, directory, workers - 1, timeout, environment):
            _run(words, directory / "run", WARM_UP + steps, timeout, {**environment, **times})
        found, noted = _newest(directory / "run"), step_times.read(directory / "times")
        seconds = noted.get("seconds", [])[WARM_UP:]
    if not seconds:
        raise UsageError(f"the recipe ends before it has taken {WARM_UP + 2} steps: give it more epochs.")
    return Recipe(
        Spread.of(seconds),
        _gradients(found, before),
        found.manifest["global_batch_size"],
        _framework(found.manifest),
        noted["device"] == "gpu",
    )


def _check_companions(workers: int, noted: Mapping[str, Any]) -> None:
    """Raise `UsageError` where workers beside the measured one would take its GPU, as each is the first of its job."""
    if workers > 1 and noted.get("device") == "gpu":
        raise UsageError(
            f"the recipe computes on a GPU, which {workers} at a time would share: measure it without "
            "--workers-per-host, and give that step's --compute-ms and --gradient-mb; or give the recipe --device cpu."
        )


def _on_its_own(workers: int) -> dict[str, str]:
    """The environment of one worker of several, with the share of the cores that tuning would give it."""
    threads = max(1, usable_cores() // workers)
    names = {"OMP_NUM_THREADS": threads, "TF_NUM_INTRAOP_THREADS": threads, "TF_NUM_INTEROP_THREADS": max(2, threads)}
    return {**({name: str(n) for name, n in names.items()} if workers > 1 else {}), **os.environ}


def _begin(
    command: Sequence[str], output: Path, steps: int | None, environment: Mapping[str, str], said: int
) -> subprocess.Popen:
    length = ["--epochs", _ENDLESS] + ([] if steps is None else ["--max-steps", str(steps)])
    line = [*command, *length, "--output", str(output), "--check-sync", "0"]
    try:
        return subprocess.Popen(
            line,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        raise UsageError(f"{line[0]} can't be run ({error.strerror}): give a command that runs.") from None


def _run(command: Sequence[str], output: Path, steps: int, timeout: float, environment: Mapping[str, str]) -> None:
    process = _begin(command, output, steps, environment, subprocess.PIPE)
    try:
        _, said = process.communicate(timeout=timeout)
    except BaseException as error:
        verify.end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise UsageError(
                f"the recipe did not end within {timeout:g} s: give --timeout, or fewer --steps."
            ) from None
        raise
    if process.returncode:
        raise UsageError(f"the recipe failed with exit code {process.returncode}: {verify.last_words(said)}")


@contextlib.contextmanager
def _companions(
    command: Sequence[str], directory: Path, number: int, timeout: float, environment: Mapping[str, str]
) -> Iterator[None]:
    """Have other workers train, each alone, from before the block to its end."""
    started: list[subprocess.Popen] = []
    try:
        for i in range(number):
            started.append(_begin(command, directory / f"other{i}", None, environment, subprocess.DEVNULL))
        end = time.monotonic() + timeout
        rows = [directory / f"other{i}" / "metrics.jsonl" for i in range(number)]
        while not all(row.exists() and row.stat().st_size for row in rows):
            if time.monotonic() > end or any(process.poll() for process in started):
                raise UsageError(f"{number + 1} runs of the recipe at a time do not train here: give fewer workers.")
            time.sleep(0.05)
        yield
    finally:
        for process in started:
            verify.end(process)


def _newest(output: Path) -> checkpoint.Checkpoint:
    found = checkpoint.newest(output)
    if found is None:
        raise UsageError("the command left no checkpoint in its --output: it must train through toolkit.run.Run.")
    return found


def _framework(manifest: Mapping[str, Any]) -> str:
    return manifest.get("backend") or manifest["framework"]


def _gradients(found: checkpoint.Checkpoint, before: checkpoint.Checkpoint | None) -> Gradients:
    """Those of the model's tensors that are no statistics and, where that is known, that steps have changed."""
    shapes = []
    for name, array in found.state.items():
        if not name.startswith("model/") or f"rank0/{name}" in found.state or array.dtype.kind != "f":
            continue
        if before is None or before.state[name].tobytes() != array.tobytes():
            shapes.append(array.shape)
    if not shapes:
        raise UsageError("the recipe's steps change no tensor of its model: give --gradient-mb.")
    return Gradients.of(shapes)


def framework() -> str:
    """One that Horovod can be measured with here.

    Raises:
        UsageError: none is installed.
    """
    for name in ("torch", "tensorflow"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise UsageError("neither torch nor tensorflow is installed to measure with: give the links, --latency-us, --gbit.")


def between(name: str, hosts: Sequence[Host], given: Mapping[str, Any], timeout: float) -> Between:
    """Measure between two workers: on two hosts, or both on one or on this machine.

    What a worker spends on an operation with itself is taken off: it is part of a step on one worker.

    Args:
        name: torch or tensorflow.
        hosts: two, one, or none for this machine.
        given: interface, ssh_port and ssh_key, as `launch.Specification` has them.
        timeout: seconds for each of the runs that it takes.

    Raises:
        UsageError: there is no mpirun, or the measurement failed; with its own words.
    """
    places = tuple(Host(host.name, 2 // len(hosts), None, host.user) for host in hosts)
    alone = _probe(name, 1, (), {}, timeout)
    pairs = [_probe(name, 2, places, given, timeout) for _ in range(ROUNDS)]
    messages = [pair["message"] for pair in pairs if "message" in pair]
    message = statistics.median(messages) if messages else None
    found = [_between("horovod", alone, pairs, message)]
    if all("mpi" in probe for probe in (alone, *pairs)):
        found.append(_between("mpi", alone["mpi"], [pair["mpi"] for pair in pairs], message))
    return min(found, key=lambda way: way.small + way.all_reduce.median)


def _between(reducer: str, alone: dict[str, Any], pairs: Sequence[dict[str, Any]], message: float | None) -> Between:
    """What all-reduces of one worker and of two show, by one reducer."""
    large = Spread.of([pair["seconds"] for pair in pairs])
    small = statistics.median(pair["latency"] for pair in pairs)
    copying = (alone["seconds"] - alone["latency"]) / alone["bytes"]
    extra = max(0.0, small - alone["latency"])
    latency = max(extra / 2, 1e-9) if message is None else message
    size = pairs[0]["bytes"]
    # Two workers send each other 2(p - 1)/p = 1 times the bytes.
    per_byte = max((large.median - small) / size - copying, 1e-15)
    return Between(Link(latency, per_byte, max(0.0, extra - 2 * latency)), large, size, small, reducer)


def _probe(name: str, ranks: int, hosts: Sequence[Host], given: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    made = launch.command(
        Specification(
            command=(sys.executable, "-m", "toolkit.plan.probe", name, str(ranks)),
            directory=os.getcwd(),
            hosts=tuple(hosts),
            ranks=ranks,
            **given,
        ),
        launch.find("mpirun", os.environ),
        os.environ,
    )
    ended = asyncio.run(processes.run(made.words, timeout, {**os.environ, **made.environment}))
    lines = [line for line in ended.out.splitlines() if line.startswith(all_reduce.MARK)]
    answers = [json.loads(line.removeprefix(all_reduce.MARK)) for line in lines]
    wrong = [answer["error"] for answer in answers if "error" in answer]
    if wrong or not answers or ended.code != 0:
        why = wrong[0] if wrong else measure.first_words(ended.err)
        late = f"did not end within {timeout:g} s" if ended.code is None else f"failed: {why}"
        raise UsageError(f"measuring the links {late}; see `hvdkit doctor`, or give --latency-us and --gbit.")
    return answers[0]

"""Elastic: kill a worker, let another come, kill again; in every framework."""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.drills.report import Drill, table
from tests.elastic_job import HOSTS, ElasticJob, last_step, outcome
from tests.launching import ROOT, WORKERS, launch
from toolkit import output, verify

_FRAMEWORKS = (("torch", "tensorflow"), ("tensorflow", "tensorflow"), ("keras", "tensorflow"), ("keras", "torch"))
_EPOCHS, _STEPS, _HOLD = 40, 280, 140
_TOLERANCE = 1e-4  # of losses and weights: other workers add in another order


def drills(times: int, size: int = 2, seed: int = 0) -> Iterator[Drill]:
    """Kill a random worker, have one come, kill a random one; each framework so many times.

    Each run's end is held against that of an undisturbed run.
    The seconds are from each kill until a step that came after it stands in metrics.jsonl.
    """
    draws = random.Random(seed)
    for framework, backend in _FRAMEWORKS:
        name = f"{framework} on {backend}" if framework == "keras" else framework
        drill = Drill("kill -9, rejoin, kill -9 (elastic)", "horovodrun-gloo", name, times)
        command = [ROOT / f"recipes/linear_regression_{framework}.py", "--epochs", str(_EPOCHS), "--audit"]
        command += ["--global-batch-size", "64"]
        with tempfile.TemporaryDirectory(prefix="hvdkit-drill-") as place:
            alone = Path(place, "alone")
            result = launch(size, [*command, "--output", alone], environment={"KERAS_BACKEND": backend})
            if result.returncode:
                raise RuntimeError(f"the undisturbed run failed: {result.stderr}")
            expected = outcome(alone, _STEPS // _EPOCHS)
            for number in range(times):
                try:
                    found = _one(Path(place, str(number)), command, backend, size, draws, drill)
                    difference = verify.compare(expected, found, _TOLERANCE)
                    assert difference.passes(_TOLERANCE), f"not the undisturbed run's end: {difference}"
                except AssertionError as error:
                    drill.failures.append(str(error).strip().replace("\n", " | ")[-2000:])
        yield drill


def _one(
    place: Path, command: list[str | Path], backend: str, size: int, draws: random.Random, drill: Drill
) -> verify.Outcome:
    run, step_file = place / "run", place / "step"
    environment = {"KERAS_BACKEND": backend, "PACE": "0.03", "STEP": str(step_file), "HOLD": f"{size - 1}:{_HOLD}"}
    line = [WORKERS / "elastic_cases.py", *command, "--output", run]
    with ElasticJob(place, line, HOSTS[:size], environment=environment) as job:
        _kill(job, run, step_file, draws, draws.randint(10, 60), size - 1, drill)
        job.set_hosts([*job.workers(), HOSTS[size]])
        job.wait_until(lambda: _told(job, size) == 1, "joining")
        _kill(job, run, step_file, draws, _HOLD + draws.randint(10, 60), size - 1, drill)
        code = job.wait()
        assert code == 0, f"exit code {code}: {job.printed()[-1500:]}"
        _check(run, job.printed())
    return outcome(run, _STEPS // _EPOCHS)


def _kill(job: ElasticJob, run: Path, step_file: Path, draws: random.Random, at: int, left: int, drill: Drill) -> None:
    """Kill a random worker once the run has come to a step; note what it took, and what was lost."""
    job.wait_until(lambda: step_file.exists() and int(step_file.read_text() or 0) >= at, f"step {at}")
    told, host = _told(job, left), draws.choice(sorted(job.workers()))
    reached = int(step_file.read_text())
    killed = job.kill(host)
    job.wait_until(lambda: _told(job, left) > told, f"going on after the kill at step {reached}")
    begun = int(re.findall(r"going on from memory at epoch \d+, step (\d+)", job.printed())[-1])
    drill.lost_steps.append(reached - begun)
    drill.seconds.append(job.wait_until(lambda: last_step(run) > begun, f"a step after {begun}") - killed)


def _told(job: ElasticJob, size: int) -> int:
    """How often the run went on with so many workers."""
    return len(re.findall(rf"going on from memory .*; {size} worker", job.printed()))


def _check(run: Path, printed: str) -> None:
    for kind, count in (("step", _STEPS), ("epoch", _EPOCHS)):
        numbers = [row[kind] for row in output.read_metrics(run, kind)]
        assert numbers == list(range(1, count + 1)), f"the rows of {kind}s are {json.dumps(numbers)}"
    audits = re.findall(r"audit of epoch (\d+): (.*)", printed)
    assert {int(epoch) for epoch, _ in audits} == {*range(1, _EPOCHS + 1)}, f"not all epochs were audited: {audits}"
    assert all("0 missed, 0 repeated" in found for _, found in audits), audits


if __name__ == "__main__":
    print(table(drills(int(sys.argv[1]) if len(sys.argv) > 1 else 1)))

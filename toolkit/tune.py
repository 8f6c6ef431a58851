"""`hvdkit tune`: searches the few settings that matter for a recipe's speed, by short runs of the recipe itself.

A candidate and the best so far run in pairs, one after the other, and in the next pair the other way round. Whether
to keep the candidate is decided after each pair by `paired.verdict`. As some are kept by chance, all that is found is
measured once more at the end, on fresh pairs against the settings of the beginning; only what that shows is told
and written.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import launch, paired, step_times, tuned, tuning
from toolkit.errors import RunFailed, UsageError
from toolkit.tuned import Job
from toolkit.verify import end, last_words

_ADDED = ("--output", "--max-steps", "--epochs", "--resume", "--folds", "--no-tuning", "--check-sync")
_PROBE_STEPS, _PROBE_DROPPED = 40, 10
_MEASURED_SECONDS = 1.5  # of each run; besides it takes some for its start
_FEWEST_STEPS, _MOST_STEPS = 30, 1000
_MOST_PAIRS = 8  # of a candidate
_LAST_PAIRS = 5, 8  # at the end: at least, so that an interval of 90 % can be told, and at most

SETTINGS = ("reducer", "threads", "cycle-time", "yield", "affinity", "fusion", "cache")
_HOROVODS = ("cycle-time", "fusion", "cache")  # of no matter where MPI adds up the gradients
# What a run has where nobody sets it. Source: Horovod's docs/tensor-fusion.rst and docs/performance, its common.h.
_LIBRARIES_OWN = {
    "HOROVOD_FUSION_THRESHOLD": "134217728",
    "HOROVOD_CACHE_CAPACITY": "1024",
    "OMPI_MCA_mpi_yield_when_idle": "0",
    tuning.AFFINITY: "0",
}


@dataclass(frozen=True)
class Measured:
    """A run's result.

    Attributes:
        name: the script's.
        job: where it ran.
        seconds: each step's, on its slowest rank.
        by_mpi: whether MPI added up the gradients.
    """

    name: str
    job: Job
    seconds: np.ndarray
    by_mpi: bool = False

    def median(self) -> float:
        """Seconds a step after a warm-up, the first fifth of the steps."""
        return float(np.median(self.seconds[len(self.seconds) // 5 :]))


@dataclass(frozen=True)
class Recipe:
    """A command that trains through `toolkit.run.Run`, and how it is launched.

    Attributes:
        job: the launch specification.
        installed: what it is launched with.
        timeout: seconds after which a run counts as failed.
    """

    job: launch.Specification
    installed: launch.Installed
    timeout: float

    def run(self, settings: Mapping[str, str], steps: int) -> Measured:
        """Train for so many steps with these variables added to the environment, and leave nothing.

        Raises:
            RunFailed: the run failed, or was no run of a recipe.
        """
        # On several hosts rank 0 is maybe not on this one, but the working directory is the same.
        place = self.job.directory if self.job.hosts else None
        with tempfile.TemporaryDirectory(prefix=".hvdkit-tune-", dir=place, ignore_cleanup_errors=True) as directory:
            times = Path(directory) / "step_times.json"
            environment = {**os.environ, tuned.VARIABLE: "", step_times.VARIABLE: str(times), **settings}
            self._train(environment, steps, Path(directory) / "run")
            try:
                found = json.loads(times.read_bytes())
            except OSError:
                raise RunFailed("it left no times of its steps: it must train through toolkit.run.Run") from None
        job = Job(**{each.name: found[each.name] for each in fields(Job)})
        by_mpi = found["by_mpi"] and "HOROVOD_CYCLE_TIME" not in environment  # else the cycle tells nothing
        return Measured(found["name"], job, np.array(found["seconds"]), by_mpi)

    def _train(self, environment: dict[str, str], steps: int, output: Path) -> None:
        added = ("--max-steps", str(steps), "--epochs", str(steps), "--output", str(output))
        quiet = ("--check-sync", "0", "--checkpoint-every", str(steps))
        made = launch.command(self._with(*added, *quiet), self.installed, environment)
        kept = {name: value for name, value in environment.items() if made.kept is None or name in made.kept}
        process = subprocess.Popen(
            made.words,
            env={**kept, **made.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, printed = process.communicate(timeout=self.timeout)
        except BaseException as error:
            end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RunFailed(f"it did not end within {self.timeout:g} s") from None
            raise
        if process.returncode:
            raise RunFailed(last_words(printed))

    def _with(self, *arguments: str) -> launch.Specification:
        return replace(self.job, command=(*self.job.command, *arguments), variables=tuple(tuned.ACCEPTED))


@dataclass
class Search:
    """The search on one recipe.

    Attributes:
        recipe: the recipe.
        steps: of each run.
        end: when it must be over, on the clock of `time.monotonic`.
        took: seconds that each run has taken, from the launcher's start to its end.
        seconds: seconds a step in the last runs: of the beginning's settings, and of those that were found.
    """

    recipe: Recipe
    steps: int
    end: float
    took: list[float] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)
    _turn: int = 0

    def run(self, settings: Mapping[str, str]) -> Measured:
        """One run, ended where it would go far beyond the end of the search.

        Raises:
            RunFailed: it failed.
        """
        began = time.monotonic()
        limit = self.recipe.timeout
        if self.took:
            limit = min(limit, max(self.end - began, 2 * self.seconds_of_a_run))
        measured = replace(self.recipe, timeout=limit).run(settings, self.steps)
        self.took.append(time.monotonic() - began)
        return measured

    @property
    def seconds_of_a_run(self) -> float:
        """What one takes, cautiously: the longest of the latest few."""
        return max(self.took[-4:])

    def affords(self, pairs: int) -> bool:
        """Whether so many pairs end in time, as far as the runs so far tell."""
        return time.monotonic() + 2 * pairs * self.seconds_of_a_run <= self.end

    def pair(self, base: Mapping[str, str], candidate: Mapping[str, str]) -> float:
        """The ratio of the candidate's time a step to the base's; every second pair runs the candidate first."""
        self._turn += 1
        if self._turn % 2:
            before, after = self.run(base).median(), self.run(candidate).median()
        else:
            after, before = self.run(candidate).median(), self.run(base).median()
        self.seconds = before, after
        return after / before

    def try_out(self, base: Mapping[str, str], candidate: Mapping[str, str]) -> tuple[list[float], bool]:
        """The ratios of pairs, as many as it takes, and whether the candidate is to be kept."""
        ratios: list[float] = []
        while len(ratios) < _MOST_PAIRS and self.affords(1 + _LAST_PAIRS[0]):
            ratios.append(self.pair(base, candidate))
            told = paired.verdict(ratios)
            if told is not None:
                return ratios, told
        return ratios, False

    def confirm(self, found: Mapping[str, str]) -> paired.Gain | None:
        """What the settings gain over those of the beginning, on fresh pairs; None: no time is left to tell."""
        fewest, most = _LAST_PAIRS
        pairs = next((n for n in range(most, fewest - 1, -1) if self.affords(n)), 0)
        ratios: list[float] = []
        times = []
        with contextlib.suppress(RunFailed):  # such as one that did not end in time
            while len(ratios) < pairs and not (ratios and paired.is_hopeless(ratios, pairs)):
                ratios.append(self.pair({}, found))
                times.append(self.seconds)
        if not ratios:
            return None
        before, after = np.median(times, axis=0)
        self.seconds = float(before), float(after)
        return paired.gain(ratios)


def candidates(first: Measured, mpi: str, environ: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The settings to try out, by name, those first of which most is to be expected.

    Args:
        first: a run of the recipe with the settings of the beginning.
        mpi: as `tuning.mpi_of` tells it.
        environ: the environment; what a run has already is no candidate.
    """
    job = first.job
    share = max(1, job.cores // job.local_workers)
    own = {name: value for name, (value, _) in tuning.defaults(mpi).items()}
    now = {tuning.THREADS: environ.get("OMP_NUM_THREADS", str(share)), **_LIBRARIES_OWN, **own, **environ}
    if first.by_mpi:
        now[tuned.REDUCER] = "mpi"
    values: dict[str, tuple[str, Sequence[str]]] = {
        "reducer": (tuned.REDUCER, ("mpi", "horovod") if mpi != "none" else ()),
        "threads": (tuning.THREADS, dict.fromkeys(str(n) for n in (share, 1, job.cores))),  # type: ignore[dict-item]
        "cycle-time": ("HOROVOD_CYCLE_TIME", ("0.2", "1", "5")),
        "yield": ("OMPI_MCA_mpi_yield_when_idle", ("1", "0") if mpi == "Open MPI" else ()),
        "affinity": (tuning.AFFINITY, ("1", "0") if job.cores >= job.local_workers else ()),
        "fusion": ("HOROVOD_FUSION_THRESHOLD", ("1048576", "0")),
        "cache": ("HOROVOD_CACHE_CAPACITY", ("1024", "0")),
    }
    for setting, (name, tries) in values.items():
        for value in tries:
            if now.get(name) != value:
                yield setting, {name: value}


def add_to(commands: Any) -> None:
    """Add the command `tune` to what `argparse.ArgumentParser.add_subparsers` gave."""
    parser = commands.add_parser(
        "tune",
        help="search the settings that make a recipe faster here, by short runs of it in pairs",
        usage="hvdkit tune [options] -- python recipes/cnn_torch.py [its options]",
    )
    parser.add_argument("-np", type=int, metavar="N", help="workers (default: all slots of the hosts)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--hostfile", metavar="FILE", help="default: the hosts of the Slurm, PBS or LSF job, or this one"
    )
    source.add_argument("-H", "--hosts", metavar="HOSTS", help="hosts and slots, such as node1:4,node2:4")
    parser.add_argument("--launcher", choices=launch.LAUNCHERS, default="mpirun", help="default: mpirun")
    parser.add_argument("--minutes", type=_positive, default=5.0, help="for all of it (default: 5)")
    parser.add_argument("--steps", type=_steps, metavar="N", help="of each run (default: by how long one takes)")
    parser.add_argument("--timeout", type=_positive, default=300, help="seconds for one run (default: 300)")
    parser.add_argument(
        "--settings", type=_settings, default=SETTINGS, metavar="NAMES", help=f"default: {','.join(SETTINGS)}"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: one in runs/ that runs look for")
    parser.add_argument(
        "command", nargs="+", metavar="-- python recipe.py …", help="the recipe's command for one worker"
    )
    parser.set_defaults(function=_command)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 10_000:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0 and at most 10000.")


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 10:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 10.")
    return int(text)


def _settings(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in SETTINGS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: give some of {','.join(SETTINGS)}.")
    return names


def _command(options: argparse.Namespace) -> int:
    ended = time.monotonic() + 60 * options.minutes
    recipe = Recipe(_specification(options), launch.find(options.launcher, os.environ), options.timeout)
    search, first = _begin(recipe, options.steps, ended)
    job = first.job
    hosts = f" on {job.workers // job.local_workers} hosts" if job.local_workers < job.workers else ""
    print(f"{shlex.join(options.command)}: {job.workers} worker(s){hosts}, {job.cores} core(s)", flush=True)
    print(f"{1000 * first.median():.3g} ms a step, {search.steps} steps a run of {search.took[-1]:.1f} s", flush=True)
    mpi = "" if options.launcher == "srun" else recipe.installed.mpi or "none"
    found = _search(search, first, list(candidates(first, mpi, os.environ)), options.settings)
    gain = search.confirm(found) if found else None
    return _tell(options, search, first, found, gain)


def _specification(options: argparse.Namespace) -> launch.Specification:
    given = {part.split("=")[0] for part in options.command}
    clash = [flag for flag in _ADDED if flag in given]
    if clash:
        raise UsageError(f"the recipe's command has {clash[0]}: leave it out, tune needs it its own way.")
    if shutil.which(options.command[0]) is None:
        raise UsageError(f"{options.command[0]} is no program here: expected one on the PATH after --, or its path.")
    hosts = tuple(launch.hosts_of(options, os.environ))
    return launch.Specification(tuple(options.command), os.getcwd(), hosts, options.np)


def _begin(recipe: Recipe, steps: int | None, ended: float) -> tuple[Search, Measured]:
    """Look how long a step and a run take.

    Raises:
        UsageError: the recipe does not run, or so long that there is no time to find anything.
    """
    search = Search(recipe, steps or _PROBE_STEPS, ended)
    try:
        first = search.run({})
        if steps is None:
            seconds = float(np.median(first.seconds[_PROBE_DROPPED:]))
            search.steps = int(min(_MOST_STEPS, max(_FEWEST_STEPS, _MEASURED_SECONDS / seconds)))
            search.took[-1] += max(0, search.steps - _PROBE_STEPS) * seconds
    except RunFailed as error:
        raise UsageError(f"{shlex.join(recipe.job.command)} fails by itself: {error}") from None
    if not search.affords(3 + _LAST_PAIRS[0]):
        needed = (1 + 2 * (3 + _LAST_PAIRS[0])) * search.took[-1] / 60
        raise UsageError(f"a run takes {search.took[-1]:.1f} s, too long: give --minutes of at least {needed:.1f}.")
    return search, first


def _search(
    search: Search, first: Measured, tries: Sequence[tuple[str, dict[str, str]]], settings: Sequence[str]
) -> dict[str, str]:
    """Try out one candidate after the other against the best so far, and print each one's ratios."""
    best: dict[str, str] = {}
    for setting, change in tries:
        if setting not in settings:
            continue
        ((name, value),) = change.items()
        if setting in _HOROVODS and best.get(tuned.REDUCER, "mpi" if first.by_mpi else "") == "mpi":
            print(f"{name}={value}: not tried, as MPI adds up the gradients", flush=True)
            continue
        if not search.affords(1 + _LAST_PAIRS[0]):
            print(f"{name}={value}: not tried, for want of --minutes", flush=True)
            continue
        try:
            ratios, keep = search.try_out(best, {**best, **change})
        except RunFailed as error:
            print(f"{name}={value}: left out, as a run with it failed: {error}", flush=True)
            continue
        print(f"{name}={value}: {' '.join(f'{r:.2f}' for r in ratios)} of the time{', kept' * keep}", flush=True)
        best = {**best, **change} if keep else best
    return best


def _tell(
    options: argparse.Namespace, search: Search, first: Measured, found: dict[str, str], gain: paired.Gain | None
) -> int:
    """Print what was found, and write it where it is faster beyond doubt."""
    if gain is None or not gain.is_faster:
        why = ""
        if gain is not None:
            why = f": {' '.join(f'{n}={v}' for n, v in found.items())} did not hold on {gain.pairs} fresh pair(s)"
        elif found:
            why = ": there was no time to measure anew what seemed to be one; give more --minutes"
        print(f"no gain found{why}; nothing is written")
        return 0
    before, after = (1000 * seconds for seconds in search.seconds)
    print(
        f"{100 * (1 - gain.ratio):.1f} % less time a step ({100 * gain.confidence:.0f} % interval "
        f"{100 * (1 - gain.high):.1f} to {100 * (1 - gain.low):.1f} %, {gain.pairs} fresh pairs): "
        f"{before:.3g} ms before, {after:.3g} ms with {' '.join(f'{n}={v}' for n, v in found.items())}"
    )
    path = options.output or tuned.path_for(first.name, first.job)
    tuned.write(path, tuned.Tuned(first.job, found, _more(options, search, gain)))
    single = first.job.local_workers == first.job.workers and options.output is None
    print(
        f"wrote {path}; "
        + ("later runs from here take it up" if single else f"runs with HVDKIT_TUNED={path} take it up")
    )
    for name in found:
        users = "OMP_NUM_THREADS" if name == tuning.THREADS and name not in os.environ else name
        if users in os.environ:
            print(f"unset {users}: it is set in this environment, which comes first")
    return 0


def _more(options: argparse.Namespace, search: Search, gain: paired.Gain) -> dict[str, Any]:
    return {
        "command": shlex.join(options.command),
        "launcher": options.launcher,
        "host": socket.gethostname(),
        "machine_cores": os.cpu_count(),
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gain": {
            "ratio": round(gain.ratio, 4),
            "interval": [round(gain.low, 4), round(gain.high, 4)],
            "confidence": round(gain.confidence, 4),
            "pairs": gain.pairs,
        },
        "milliseconds_per_step": {
            name: round(1000 * s, 4) for name, s in zip(("before", "after"), search.seconds, strict=True)
        },
        "steps_of_a_run": search.steps,
    }

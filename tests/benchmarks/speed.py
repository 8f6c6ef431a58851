"""The speed of the toolkit beside its peers' on the same cores.

    python -m tests.benchmarks.speed                       # make bench: writes tests/benchmarks/results/
    python -m tests.benchmarks.speed --only torch:cnn:2    # some of it; the results that are kept stay as they are
    python -m tests.benchmarks.speed --only torch --update # measured again, in the place of what was kept of it
    python -m tests.benchmarks.speed --short               # one model on 2 ranks: a look at whether it runs

Who competes is in groups.py, how in arena.py, and each contestant is a script in contestants/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tests.benchmarks import groups, report, whole_runs
from tests.benchmarks.arena import Failed, Result, compete
from tests.benchmarks.models import MODELS
from toolkit.tuning import usable_cores

RESULTS = Path(__file__).parent / "results"
UNFINISHED = "unfinished.json"
WHOLE_RUNS = "start", "epoch"  # what --only takes beside groups


def main() -> None:
    """Measure what was asked for, print the tables, and write them where all of it was, or where told."""
    options = _parse()
    signal.signal(signal.SIGTERM, _leave)
    results: dict[str, Any] = {"machine": _machine(options), "groups": [], "first_step": {}, "epochs": {}}
    chosen = groups.SHORT if options.short else groups.selected([w for w in options.only if w not in WHOLE_RUNS])
    if options.only and not set(options.only) - set(WHOLE_RUNS):
        chosen = []
    if options.update:
        kept = json.loads((options.output / "results.json").read_text())
        again, results = results["machine"], kept
    with tempfile.TemporaryDirectory(prefix="hvdkit-bench-") as directory:
        for i, group in enumerate(chosen, 1):
            say(f"{i}/{len(chosen)} {group.name}")
            found = _run_group(group, options, Path(directory))
            if options.update:
                found["again"] = again
            _put(results["groups"], found)
            _keep(results, options)
        for what, measure in (("start", _starts), ("epoch", _epochs)):
            if what in options.only or not (options.only or options.short):
                measure(results, options, Path(directory))
    text = report.markdown(results)
    print(text, end="")
    _keep(results, options)
    if options.output is not None:
        (options.output / UNFINISHED).replace(options.output / "results.json")
        (options.output / "results.md").write_text(text)
        _draw(results, options.output)


def _put(found: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """Add a group's results, in the place of those that it has there."""
    places = [i for i, other in enumerate(found) if other["name"] == group["name"]]
    if places:
        found[places[0]] = group
    else:
        found.append(group)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--short", action="store_true", help="one group, short turns; writes nothing")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="torch:cnn:2 and the like, from the right less, or start (launch to first step) or epoch; writes nothing",
    )
    parser.add_argument("--update", action="store_true", help="with --only: put them into the results that are kept")
    parser.add_argument(
        "--rounds", type=int, default=None, help="turns of each contestant (default: 7, 5 but with 2 ranks; --short: 5)"
    )
    parser.add_argument(
        "--turn",
        type=float,
        default=None,
        help="seconds a turn, half of it but with 2 ranks (default: 1; --short: 0.2)",
    )
    parser.add_argument("--output", type=Path, default=None, help="where results go (default, of all: %(default)s)")
    options = parser.parse_args()
    try:
        groups.selected([word for word in options.only if word not in WHOLE_RUNS])
    except ValueError as error:
        parser.error(str(error))
    options.rounds = options.rounds or (5 if options.short else 7)
    options.turn = options.turn or (0.2 if options.short else 1.0)
    if options.rounds < 1 or options.turn <= 0:
        parser.error("--rounds and --turn: give at least one round, and more than 0 seconds.")
    if options.output is None and not options.short and (options.update or not options.only):
        options.output = RESULTS
    if options.update and not (options.only and (options.output / "results.json").is_file()):
        parser.error(f"--update: give --only, and an --output with results.json; {options.output} has none.")
    return options


def _leave(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)  # by way of the ends of all contestants


def say(line: str) -> None:
    """Tell how far it is, apart from the results."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cores": usable_cores(),
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown"),
        "load": os.getloadavg()[0],
        "rounds": options.rounds,
        "turn_seconds": options.turn,
        "tensorflow": version(packages_distributions()["tensorflow"][0]),  # or tensorflow-cpu, as it is called
        **{name: version(name) for name in ("torch", "keras", "horovod")},
    }


def _run_group(group: groups.Group, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    contestants = groups.CONTESTANTS[group.framework]
    reference = groups.REFERENCE[group.framework]
    with tempfile.TemporaryDirectory(dir=directory) as own:
        found = compete(
            contestants,
            group.model,
            group.ranks,
            # Targets are about two ranks; the others show how it scales.
            rounds=options.rounds if group.ranks == 2 else min(options.rounds, 5),
            turn_seconds=options.turn if group.ranks == 2 else options.turn / 2,
            warm_steps=MODELS[group.model].warm_steps,
            directory=Path(own),
            say=lambda line: say(f"  {line}"),
        )
        told = {}
        for contestant in contestants:
            result = found[contestant.name]
            told[contestant.name] = {
                **dataclasses.asdict(result),
                "talks": contestant.talks,
                "difference": _difference(result, found[reference]),
            }
            del told[contestant.name]["weights"], told[contestant.name]["initial"]
    return {"name": group.name, **dataclasses.asdict(group), "contestants": told}


def _difference(result: Result, reference: Result) -> float | None:
    """Norm of the difference of two contestants' weights, over that of how far the reference's have moved.

    None where one of them has none.
    """
    directories = [result.weights, reference.weights, reference.initial]
    if any(directory is None or not directory.exists() for directory in directories):
        return None
    apart = moved = 0.0
    for name in sorted(path.name for path in reference.weights.iterdir()):
        own, right, begin = (np.load(directory / name).astype(np.float64) for directory in directories)
        apart += float(np.sum((own - right) ** 2))
        moved += float(np.sum((right - begin) ** 2))
    return (apart / moved) ** 0.5 if moved else None


def _starts(results: dict[str, Any], options: argparse.Namespace, directory: Path) -> None:
    for framework in ("torch", "tensorflow"):
        for launcher in ("mpirun", "horovodrun"):
            name = f"{framework} by {launcher}"
            say(f"from launch to the first step: {name}")
            try:
                found = whole_runs.seconds_to_first_step(framework, launcher, min(options.rounds, 5), directory)
            except Failed as failure:
                found = str(failure)
            results["first_step"][name] = found
            _keep(results, options)


def _epochs(results: dict[str, Any], options: argparse.Namespace, directory: Path) -> None:
    for framework in ("torch", "tensorflow"):
        say(f"epochs with input: {framework}")
        try:
            found = whole_runs.seconds_per_epoch(framework, 3, 11, directory)
        except Failed as failure:
            found = str(failure)
        results["epochs"][framework] = found
        _keep(results, options)


def _keep(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what there is so far, where results are wanted; an earlier run's stay until this one is complete."""
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / UNFINISHED).write_text(json.dumps(results, indent=1) + "\n")


def _draw(results: dict[str, Any], output: Path) -> None:
    try:
        from tests.benchmarks import plots
    except ImportError as error:
        say(f"no pictures: {error}; pip install -e '.[plot]'")
        return
    plots.draw(results, output)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; all contestants have ended")
        sys.exit(130)

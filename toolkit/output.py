"""A run's directory: found or made, and its metrics.jsonl."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from toolkit import checkpoint
from toolkit.adapters import Adapter
from toolkit.errors import UsageError
from toolkit.world import World

_RUNS = Path("runs")
T = TypeVar("T")


def decided_by_rank_0(world: World, adapter: Adapter, decide: Callable[[], T], all_groups: bool = False) -> T:
    """What `decide` returns on rank 0, on every rank; it alone looks at the disk.

    Args:
        world: what `start` returned.
        adapter: the adapter in use.
        decide: called on rank 0 alone; gives anything that pickles.
        all_groups: rank 0 of the whole job decides, for all groups.

    Raises:
        UsageError: `decide` raised it; on every rank.
    """
    answer: Any = None
    if world.rank == 0 and not (all_groups and world.group > 0):
        try:
            answer = decide()
        except UsageError as error:
            answer = error
    answer = adapter.gather(answer, all_groups=all_groups)[0]
    if isinstance(answer, UsageError):
        raise answer
    return answer


def choose(name: str, output: Path | None, resume: bool) -> Path:
    """The directory of a run: an empty one, or with `resume` the run's that is there.

    Args:
        name: the script's; without `output` the directory is `runs/<name>-001`, with the next free
            number, or with `resume` the last one.
        output: what the user named.
        resume: go on with the run that is there.

    Raises:
        UsageError: the directory holds another run, can't be made, or there is none to resume.
    """
    numbers = [p.name.removeprefix(f"{name}-") for p in _RUNS.glob(f"{name}-[0-9]*") if p.is_dir()]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    if resume:
        directory = output or (_RUNS / f"{name}-{last:03d}" if last else None)
        if directory is None:
            raise UsageError(f"--resume found no run of {name} under {_RUNS}/: name one with --output.")
        return directory
    if output is None:
        return _new_directory(name, last + 1)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is not an empty directory: choose another --output, or add --resume.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output} can't be made: {error.strerror}.") from None
    return output


def to_resume(directory: Path) -> checkpoint.Checkpoint:
    """The newest whole checkpoint of a run.

    Raises:
        UsageError: there is none.
    """
    found, damages = checkpoint.newest_whole(checkpoint.steps(directory))
    for damage in damages:
        print(f"warning: damaged checkpoint passed over: {damage}", file=sys.stderr)
    if found is None and any(directory.glob("fold-*")):
        raise UsageError(f"{directory} is of a cross-validation: add --folds, or name one of its fold-… with --output.")
    if found is None:
        raise UsageError(f"--resume found no whole checkpoint in {directory}: choose another --output to begin anew.")
    return found


class Metrics:
    """The rows of metrics.jsonl, one JSON object a line.

    Args:
        directory: the run's.
        step: rows after this step, which a resumed run writes again, are removed.
    """

    def __init__(self, directory: Path, step: int) -> None:
        path = directory / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _is_past(line, step)] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Add a row, and give it to the operating system."""
        self._file.write(json.dumps({"kind": kind, **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind, `step` or `epoch`, that a run has written; those left unfinished are skipped."""
    rows = []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("kind") == kind:
            rows.append(row)
    return rows


def _is_past(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # a row that a killed run left unfinished


def _new_directory(name: str, number: int) -> Path:
    """Make `runs/<name>-<number>`, or with the next number that no other run takes meanwhile."""
    while True:
        directory = _RUNS / f"{name}-{number:03d}"
        try:
            directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UsageError(f"{directory} can't be made: {error.strerror}; name another with --output.") from None

"""Cross-validation: one run a fold, one after the other or several at the same time, and the table of results."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from toolkit import checkpoint, elastic, ending, output, run
from toolkit.adapters import Adapter
from toolkit.errors import RunFailed, UsageError
from toolkit.files import write_whole
from toolkit.options import RunOptions
from toolkit.sharding import k_fold
from toolkit.stopping import listening
from toolkit.world import World

Options = TypeVar("Options", bound=RunOptions)


def each_fold(
    options: Options, world: World, adapter: Adapter, train: Any, test: Any
) -> Iterator[tuple[Options, Any, Any]]:
    """What to train with, and on: once as given, or with `--folds` once for each fold that is this worker's.

    With `--folds k`, fold f of `toolkit.sharding.k_fold` is held out in the f-th run, under
    `<output>/fold-f/`. The groups of workers that `--fold-groups` makes take the folds in turn. After
    the last one, rank 0 prints the table of all folds' last epochs with mean and deviation, and
    writes it to `<output>/folds.json`.

    Args:
        options: the recipe's options.
        world: what `start` returned.
        adapter: the adapter in use.
        train: the training samples; has `len()` and `take(indices)`.
        test: what to test with where there are no folds.

    Yields:
        (options, train, test): the options with the fold's output directory, the samples to train on,
        and those to test with.

    Raises:
        UsageError: the options do not fit each other or the data; on every rank.
    """
    if options.folds is None:
        if options.fold is not None or world.groups > 1:
            raise UsageError("--fold and --fold-groups are about cross-validation: give --folds too.")
        yield options, train, test
        return
    if elastic.is_active():
        raise UsageError("--folds in an elastic job: train folds without --host-discovery-script, or leave it out.")
    if options.fold is not None and options.fold > options.folds:
        raise UsageError(f"--fold is {options.fold}: give 1 to {options.folds}, the number of --folds.")
    folds = range(options.folds) if options.fold is None else [options.fold - 1]
    if options.batch_size and len(set(adapter.gather(world.size, all_groups=True))) > 1:
        raise UsageError(
            f"--batch-size with {world.groups} groups of unequal size: give --global-batch-size, or as many workers "
            "to each group."
        )
    if world.groups > len(folds):
        raise UsageError(f"--fold-groups is {world.groups}: there are {len(folds)} fold(s) to train at the same time.")
    splits = {fold: k_fold(len(train), options.folds, fold, options.seed) for fold in folds}
    directory = output.decided_by_rank_0(
        world,
        adapter,
        lambda: output.choose(run.script_name(), options.output, options.resume),
        all_groups=True,
    )
    results: dict[int, dict[str, float]] = {}
    for fold in folds[world.group :: world.groups]:
        place = directory / f"fold-{fold + 1}"
        resume = output.decided_by_rank_0(world, adapter, place.is_dir) if options.resume else False
        fitting, held_out = splits[fold]
        yield (
            replace(options, output=place, resume=resume, fold=fold + 1),
            train.take(fitting),
            train.take(held_out),
        )
        if world.rank == 0:
            results[fold + 1] = _last_epoch(place)
    with listening() as signals:  # between the operations of gathering a signal would leave the others alone
        found = adapter.gather(results, all_groups=True)
    if None in found:  # what a group gathers that was told to stop, when it leaves the job
        told = 128 + (signals.received or signal.SIGTERM)
        ending.note(told)
        raise SystemExit(told)
    for other in found:
        results.update(other)
    if world.rank == world.group == 0:
        file = directory / "folds.json"
        results = dict(sorted({**_saved_results(file, options.folds), **results}.items()))
        print(table(results), flush=True)
        try:
            write_whole(file, json.dumps(results, indent=1).encode() + b"\n")
        except OSError as error:
            raise RunFailed(
                f"{file} could not be written: {checkpoint.reason(error)}; the table above is it."
            ) from None


def table(results: Mapping[int, Mapping[str, float]]) -> str:
    """A row a fold, then their mean and standard deviation (divisor n − 1)."""
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    widths = [max(len(name), 10) + 2 for name in names]
    lines = ["fold".ljust(10) + "".join(name.replace("_", " ").rjust(w) for name, w in zip(names, widths, strict=True))]
    columns = np.array([[row.get(name, np.nan) for name in names] for _, row in sorted(results.items())])
    rows = [(str(fold), values) for fold, values in zip(sorted(results), columns, strict=True)]
    if len(rows) > 1:
        rows += [("mean", columns.mean(axis=0)), ("deviation", columns.std(axis=0, ddof=1))]
    for head, values in rows:
        lines.append(head.ljust(10) + "".join(f"{v:.4g}".rjust(w) for v, w in zip(values, widths, strict=True)))
    return "\n".join(lines)


def _last_epoch(directory: Path) -> dict[str, float]:
    rows = output.read_metrics(directory, "epoch")
    return _numbers(rows[-1]) if rows else {}


def _numbers(row: Any) -> dict[str, float]:
    """What a row says of how the fold was learned."""
    items = row.items() if isinstance(row, dict) else ()
    return {k: v for k, v in items if isinstance(v, int | float) and k not in ("kind", "epoch", "step", "seconds")}


def _saved_results(file: Path, folds: int) -> dict[int, dict[str, float]]:
    """The results of folds that were trained before; those of a file that is none are left out."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    rows = found.items() if isinstance(found, dict) else ()
    return {int(fold): _numbers(row) for fold, row in rows if fold in map(str, range(1, folds + 1))}

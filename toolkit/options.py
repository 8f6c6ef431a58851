"""Command-line options from one typed dataclass: every field is a flag with a help line."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from toolkit import ending, sharding, world
from toolkit.devices import DEVICES
from toolkit.world import World

REDUCERS = ("auto", "horovod", "mpi")


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float = math.inf,
    above: float | None = None,
    below: float = math.inf,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that becomes a flag.

    Args:
        default: its value without the flag. A bool becomes a switch.
        help: one line for `--help`, with the unit.
        minimum: smallest value accepted.
        maximum: largest value accepted.
        above: the value must be larger than this.
        below: the value must be smaller than this.
        choices: the words accepted.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """What every job's workers are started with, whatever they compute."""

    compression: str = option("none", "of gradients: none, fp16, bf16, int8, topk[:share] or powersgd[:rank]")
    reducer: str = option("auto", "who adds up gradients; auto: whichever is faster here", choices=REDUCERS)
    seed: int = option(0, "for initial weights and the order of the samples", minimum=0, maximum=2**32 - 1)
    deterministic: bool = option(
        False,
        "runs repeat to the bit whatever is reduced at the same time; on GPUs it is what makes runs and resumes do so",
    )
    stall_timeout: float = option(
        300.0, "seconds after which a worker that the others wait for ends the job; 0: never", minimum=0
    )
    device: str = option(
        "auto", "what to compute on; auto: a GPU for each worker where there are as many", choices=DEVICES
    )
    share_gpus: bool = option(False, "let workers share a GPU where a host has more workers than GPUs")
    no_tuning: bool = option(False, "leave threads and Horovod's and MPI's settings alone")
    verbose: bool = option(False, "print the chosen settings with their reasons")

    @property
    def start(self) -> dict[str, Any]:
        """The arguments of an adapter's `start`."""
        return {
            "seed": self.seed,
            "tune": not self.no_tuning,
            "verbose": self.verbose,
            "deterministic": self.deterministic,
            "stall_timeout": self.stall_timeout,
            "device": self.device,
            "share_gpus": self.share_gpus,
        }

    @property
    def distribute(self) -> dict[str, Any]:
        """The arguments of an adapter's `distribute`."""
        return {"compression": self.compression, "reducer": self.reducer}


@dataclasses.dataclass(frozen=True)
class RunOptions(JobOptions):
    """The options that every recipe with a training run has; `toolkit.run.Run` reads them."""

    epochs: int = option(10, "times that each sample is used", minimum=1)
    global_batch_size: int = option(32, "samples per step over all workers", minimum=1)
    batch_size: int | None = option(
        None, "samples per step and worker instead: the rate is scaled by the number of workers", minimum=1
    )
    accumulation_steps: int = option(1, "passes that a worker cuts its part of a global batch into", minimum=1)
    learning_rate: float = option(0.02, "for the global batch size, or for one worker's --batch-size", above=0)
    warmup_epochs: float = option(1.0, "length of the warm-up where --batch-size scales the rate", minimum=0)
    sharding: str = option(
        "random", "a new order each epoch, or each worker its own contiguous block", choices=sharding.KINDS
    )
    folds: int | None = option(
        None, "cross-validate: train once for each of so many folds, held out in turn", minimum=2
    )
    fold: int | None = option(None, "train only this one of the --folds, from 1", minimum=1)
    fold_groups: int = option(1, "groups of workers that train folds at the same time", minimum=1)
    output: Path | None = option(None, "directory for checkpoints and metrics.jsonl (default: a new one under runs/)")
    resume: bool = option(False, "continue the run in --output, or the latest run under runs/")
    keep: int = option(3, "checkpoints to keep", minimum=1)
    checkpoint_every: int = option(1, "epochs between checkpoints; the last epoch has one always", minimum=1)
    checkpoint_steps: int | None = option(None, "steps between checkpoints, besides those of epochs", minimum=1)
    commit_steps: int = option(
        10, "in elastic mode: steps between commits to memory, from which the run goes on", minimum=1
    )
    print_every: int = option(1, "epochs between printed lines", minimum=1)
    max_steps: int | None = option(None, "end after this many steps; 0: with the initial state", minimum=0)
    check_sync: int | None = option(
        None,
        "steps between checks that all ranks hold the same model; 0: none (default: at most 1 % of the time)",
        minimum=0,
    )
    audit: bool = option(False, "count after each epoch that every sample was used once")
    on_nan: str = option(
        "stop", "where a gradient or loss is not finite: end the run, or skip the step", choices=("stop", "skip")
    )

    def samples_per_step(self, world: World) -> int:
        """The global batch size in samples."""
        return self.batch_size * world.size if self.batch_size else self.global_batch_size

    @property
    def start(self) -> dict[str, Any]:
        """The arguments of an adapter's `start`."""
        return {**super().start, "groups": self.fold_groups}

    @property
    def distribute(self) -> dict[str, Any]:
        """The arguments of an adapter's `distribute`."""
        return {**super().distribute, "accumulation_steps": self.accumulation_steps}


Options = TypeVar("Options")


def parse(kind: type[Options], description: str | None, arguments: list[str] | None = None) -> Options:
    """Parse the command line into a `kind`; what is wrong with it is one line and exit code 2.

    Under a launcher only rank 0 prints the line: all workers have the same command line.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(kind)
    of_job = [field.name for field in dataclasses.fields(JobOptions)]
    # Those of the job come last in --help: a recipe's own are what is looked for.
    for field in sorted(dataclasses.fields(kind), key=lambda field: field.name in of_job):  # type: ignore[arg-type]
        _add_flag(parser, field, hints[field.name])
    given = list(sys.argv[1:] if arguments is None else arguments)
    values = vars(parser.parse_args(given))
    if "--batch-size" in _flags(given) and "--global-batch-size" in _flags(given):
        parser.error("both --batch-size and --global-batch-size are given: choose one of them.")
    return kind(**values)


def _flags(arguments: list[str]) -> set[str]:
    return {argument.split("=")[0] for argument in arguments}


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    names = ["-v", flag] if flag == "--verbose" else [flag]
    help_line = field.metadata["help"].replace("%", "%%")
    if hint is bool:
        parser.add_argument(*names, action="store_true", help=help_line)
        return
    base = next(t for t in typing.get_args(hint) if t is not type(None)) if _is_union(hint) else hint
    shown = "" if field.default is None else f" (default: {field.default})"
    convert = _converter(flag, base, field.metadata)
    choices = field.metadata["choices"]
    metavar = "|".join(choices) if choices else base.__name__.upper()
    parser.add_argument(*names, type=convert, default=field.default, metavar=metavar, help=help_line + shown)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _converter(flag: str, base: type, limits: Mapping[str, Any]) -> Any:
    minimum, maximum, above, below = (limits[name] for name in ("minimum", "maximum", "above", "below"))
    accepted = {int: "a whole number", float: "a number"}.get(base, f"a {base.__name__}")
    if minimum is not None:
        accepted += f" of at least {minimum}"
    if above is not None:
        accepted += f" above {above}"
    if maximum < math.inf:
        accepted += f" and at most {maximum}"
    if below < math.inf:
        accepted += f" and below {below}"
    if limits["choices"]:
        accepted = " or ".join(limits["choices"])

    def convert(text: str) -> Any:
        try:
            value = base(text)
        except ValueError:
            value = None
        out_of_range = value is not None and (
            (minimum is not None and not minimum <= value < math.inf)
            or (above is not None and not above < value < math.inf)
            or (maximum < math.inf and value > maximum)
            or (below < math.inf and not value < below)
            or (limits["choices"] and value not in limits["choices"])
        )
        if value is None or out_of_range:
            raise argparse.ArgumentTypeError(f"{flag} is {text!r}: give {accepted}.")
        return value

    return convert


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, on rank 0 only."""

    def error(self, message: str) -> NoReturn:
        launched = world.from_launcher()
        if launched is None or launched.rank == 0:
            unknown = re.match(r"unrecognized arguments: (.*)", message)
            if unknown:
                message = f"unknown option {unknown[1]}: --help lists what there is."
            message = re.sub(r"^argument \S+: (?=--)", "", message)  # the converters name the flag themselves
            print(f"error: {message}", file=sys.stderr)
        ending.note(2)
        sys.exit(2)

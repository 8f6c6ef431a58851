"""The command `hvdkit plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import UsageError
from toolkit.plan import measure, plot, sources, table
from toolkit.plan.cost import ALL_REDUCES
from toolkit.plan.schemes import SCHEMES, Compression
from toolkit.plan.step import Compute, Training, worker_counts

_MOST_WORKERS = 65_536


def add_to(commands: Any) -> None:
    """Add the command `plan` to what `argparse.ArgumentParser.add_subparsers` gave."""
    parser = commands.add_parser(
        "plan",
        help="on how many workers, and by which all-reduce, does training still pay? measured here, predicted on paper",
        usage="hvdkit plan [options] [-- python recipes/cnn_torch.py [its options]]",
        description="What no option gives is measured: compute time and gradients with the recipe, links between two "
        "workers. With --compute-ms, --gradient-mb, --latency-us and --gbit, and the --local-… ones for several "
        "workers a host, nothing is run.",
    )
    number = _number
    given = parser.add_argument_group("in place of measuring")
    given.add_argument("--compute-ms", type=number, metavar="MS", help="a step of one worker, without any exchange")
    given.add_argument("--batch", type=_whole, metavar="N", help="samples of that step (default: 1)")
    given.add_argument("--fixed-ms", type=number, metavar="MS", help="of it, what fewer samples do not shorten")
    given.add_argument("--gradient-mb", type=number, metavar="MB", help="all gradients as float32, in 10⁶ bytes")
    given.add_argument("--latency-us", type=number, metavar="US", help="of a message between hosts")
    given.add_argument("--gbit", type=number, metavar="GBIT", help="a second, of a host's link to the network")
    given.add_argument("--local-latency-us", type=number, metavar="US", help="of a message within a host")
    given.add_argument("--local-gbit", type=number, metavar="GBIT", help="a second, between two workers of a host")
    given.add_argument("--agreement-us", type=number, metavar="US", help="for two workers to agree on an operation")
    _add_places(parser)
    parser.add_argument(
        "--max-workers", type=_whole, default=1024, metavar="N", help="plan up to these (default: 1024)"
    )
    parser.add_argument(
        "--scaling",
        choices=("weak", "strong"),
        help="weak: each worker has the samples of the measured step; strong: all workers have them together (default: "
        "as the recipe does it: strong, or with --batch-size weak; weak without a recipe)",
    )
    parser.add_argument(
        "--backward-share", type=number, default=2 / 3, metavar="X", help="of the compute time (default: 0.667)"
    )
    parser.add_argument(
        "--bucket-mb", type=number, metavar="MB", help="for overlap (default: the best of 1 to 64 buckets)"
    )
    parser.add_argument("--top-k", type=number, default=0.01, metavar="X", help="share of the values (default: 0.01)")
    parser.add_argument("--powersgd-rank", type=_whole, default=4, metavar="R", help="default: 4")
    parser.add_argument(
        "--compression-ms",
        type=_cost,
        action="append",
        default=[],
        metavar="NAME=MS",
        help=f"what a compression costs a step, such as int8=3.5; of {', '.join(SCHEMES[1:])}",
    )
    parser.add_argument("--pays", type=number, default=80, metavar="PERCENT", help="efficiency that pays (default: 80)")
    parser.add_argument("--steps", type=_whole, default=50, metavar="N", help="to measure (default: 50)")
    parser.add_argument("--timeout", type=number, default=600, metavar="S", help="seconds for a run (default: 600)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it too: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument(
        "recipe", nargs="*", metavar="-- python recipe.py …", help="the recipe's command for one worker"
    )
    parser.set_defaults(function=_plan)


def _add_places(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--hostfile", metavar="FILE", help="measure between its first two hosts, not on this machine")
    source.add_argument("-H", "--hosts", metavar="HOSTS", help="hosts and slots, such as node1:4,node2:4")
    parser.add_argument("--interface", metavar="NAME", help="network interface, of the same name on all hosts")
    parser.add_argument("--ssh-port", type=int, metavar="PORT")
    parser.add_argument("--ssh-key", metavar="FILE", help="private key")
    parser.add_argument(
        "--workers-per-host", type=_whole, metavar="N", help="default: the slots of the first host, or 1 without hosts"
    )


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of at least 0.")
    return value


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) <= _MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 to {_MOST_WORKERS}.")
    return int(text)


def _cost(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in SCHEMES[1:]:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=MS, and as NAME one of {', '.join(SCHEMES[1:])}.")
    return name, _number(value) / 1e3


def _plan(options: argparse.Namespace) -> int:
    _check(options)
    made = sources.plan(options)
    training = made.training
    counts = worker_counts(training.links.workers_per_host, options.max_workers)
    lines = [
        *made.about,
        "",
        "Milliseconds a step, gradients all-reduced after the backward pass | and during it",
        *table.all_reduces(training, counts),
        "",
        "Milliseconds a step without overlap, by what travels (* without what compressing costs: --compression-ms)",
        *table.compressions(training, counts),
        "",
        *table.verdict(training, counts, options.pays / 100),
        *made.warnings,
    ]
    print("\n".join(lines), flush=True)
    if options.plot is not None:
        plot.write(options.plot, training, counts, made.about[0])
        print(f"wrote {options.plot}", flush=True)
    if options.json is not None:
        _write(options.json, training, counts)
        print(f"wrote {options.json}", flush=True)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what can't be planned before anything is run.

    Raises:
        UsageError: it can't.
    """
    measures = options.compute_ms is None or options.gradient_mb is None
    if measures and not options.recipe:
        raise UsageError("there is nothing to plan: give -- python recipe.py …, or --compute-ms and --gradient-mb.")
    for name in ("compute_ms", "gradient_mb", "gbit", "local_gbit", "bucket_mb", "timeout"):
        if getattr(options, name) == 0:
            raise UsageError(f"--{name.replace('_', '-')} is 0: give more.")
    if not 0 < options.pays <= 100:
        raise UsageError(f"--pays is {options.pays:g}: give a percentage, over 0 to 100.")
    if options.compute_ms is not None and options.batch is None and sources.is_strong(options):
        raise UsageError("a step's samples are to be cut among the workers: give --batch N too, or --scaling weak.")
    if options.compute_ms is None and (options.batch is not None or options.fixed_ms is not None):
        raise UsageError("--batch and --fixed-ms tell of --compute-ms: give it too, or leave them out.")
    if options.workers_per_host and options.workers_per_host > options.max_workers:
        raise UsageError(f"--max-workers is {options.max_workers}: give at least a host's, {options.workers_per_host}.")
    measure.check_command(options.recipe)
    Compute(1.0, backward=options.backward_share)
    Compression(share=options.top_k, rank=options.powersgd_rank)
    if options.plot is not None:
        plot.check(options.plot)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UsageError(f"--json {options.json}: {options.json.absolute().parent} is no directory: name another.")


def _write(path: Path, training: Training, counts: Sequence[int]) -> None:
    """All figures, as one JSON document; seconds and bytes.

    Raises:
        UsageError: the file can't be written.
    """
    compute, links = training.compute, training.links
    steps = [
        step
        for n in counts
        for c in training.compressions
        for name in ALL_REDUCES
        for buckets in sorted({1, *training.buckets()})
        if (step := training.step(n, name, c, buckets))
    ]
    document = {
        "compute": dataclasses.asdict(compute),
        "gradient_bytes": training.gradients.size,
        "links": dataclasses.asdict(links),
        "steps": [dataclasses.asdict(step) for step in steps],
    }
    try:
        path.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"--json {path}: {error.strerror}: name a file that can be written.") from None

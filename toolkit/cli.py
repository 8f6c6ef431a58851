"""The command `hvdkit`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version

from toolkit import checkpoint_cli, hostfile, launch, restart, tune, verify
from toolkit.doctor import command as doctor
from toolkit.errors import UsageError
from toolkit.plan import command as plan


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand and return the exit code: 0, 1 where a check failed, 2 for a user's mistake, 130 at Ctrl-C."""
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        with _signals_as_exit():
            code = options.function(options)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `hvdkit … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes when it ends
        return 128 + signal.SIGPIPE


@contextlib.contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end a command as Ctrl-C does: with what it has started and its temporary directories."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    kinds = (kind for kind in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(kind) is not signal.SIG_IGN)  # nohup
    before = {kind: signal.signal(kind, leave) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a subcommand.

    Raises:
        UsageError: some are the script's own, as no -- stands before its command.
    """
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    command: list[str] = getattr(options, "command", None) or getattr(options, "recipe", None) or []
    forgotten = unknown and command and "--" not in arguments
    if forgotten and arguments.index(command[0]) < arguments.index(unknown[0]):
        name = options.subcommand
        raise UsageError(
            f"{unknown[0]} is no option of hvdkit {name}: put -- before the script's command: "
            f"hvdkit {name} … -- {shlex.join(command)} …"
        )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hvdkit", description="Proof and tools for data-parallel training.")
    parser.add_argument("--version", action="version", version=f"hvdkit {version('hvdkit')}")
    commands = parser.add_subparsers(
        required=True, dest="subcommand", metavar="verify|checkpoint|restart|hosts|launch|doctor|env|tune|plan"
    )

    command = commands.add_parser(
        "verify",
        help="run a recipe with several numbers of workers, and compare losses and weights",
        usage="hvdkit verify [options] -- python recipes/cnn_torch.py [its options]",
    )
    command.add_argument(
        "-np",
        default=[1, 2, 4],
        type=_sizes,
        help="numbers of workers, such as 1,2,4; the first is the reference",
    )
    command.add_argument("--steps", default=50, type=_positive, help="steps of each run (default: 50)")
    command.add_argument("--tolerance", default=1e-4, type=float, help="largest relative difference (default: 1e-4)")
    command.add_argument(
        "--against",
        metavar="COMMAND",
        help="another framework's recipe, run with the first number of workers",
    )
    command.add_argument("--against-tolerance", default=1e-3, type=float, help="for --against (default: 1e-3)")
    command.add_argument("--timeout", default=600, type=float, help="seconds for one run (default: 600)")
    command.add_argument("--once", action="store_true", help="run each size once, without a look at repeatability")
    command.add_argument(
        "recipe",
        nargs="+",
        metavar="-- python recipe.py …",
        help="the recipe's command for one worker; without --device in it, all runs are on CPUs",
    )
    command.set_defaults(function=_verify)

    checkpoint_cli.add_to(commands)
    restart.add_to(commands)
    hostfile.add_to(commands)
    launch.add_to(commands)
    doctor.add_to(commands)
    tune.add_to(commands)
    plan.add_to(commands)
    return parser


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers of at least 1.")
    return [int(part) for part in parts]


def _positive(text: str) -> int:
    return _sizes(text)[0]


def _verify(options: argparse.Namespace) -> int:
    recipe, tolerance = verify.Recipe(options.recipe, options.timeout), options.tolerance
    print(f"{shlex.join(options.recipe)}: {options.steps} steps, tolerance {tolerance:g}", flush=True)
    reference: verify.Outcome | None = None
    failed = False
    for size in options.np:
        outcome = recipe.run(size, options.steps)
        if reference is None:
            _check_began(options.recipe, outcome)
            print(f"{'run':<16}{'loss differs':>14}{'weights differ':>16}  {'repeats':<9}verdict", flush=True)
        again = None if options.once or outcome.error else recipe.run(size, options.steps)
        repeats = "-" if again is None else "yes" if _same_bits(outcome, again) else "no"
        reason = _row(f"{size} worker(s)", reference, outcome, tolerance, repeats)
        failed |= reason is not None
        if outcome.error:
            print(f"  {outcome.error}")
        elif reason is not None and reference is not None:
            print(f"  {verify.explain(recipe, size, outcome, reason, tolerance)}")
        if reference is None:
            if outcome.error:
                return 1
            reference = outcome
            if outcome.steps_per_epoch > options.steps:
                print(f"  an epoch has {outcome.steps_per_epoch} steps: its last, smaller batch is not reached")
    if options.against and reference is not None:
        other = verify.Recipe(shlex.split(options.against), options.timeout).run(options.np[0], options.steps)
        _check_began(shlex.split(options.against), other)
        found = _row("against", reference, other, options.against_tolerance, "-")
        failed |= found is not None
        print(f"  {options.against}{': ' + other.error if other.error else ''}")
    return 1 if failed else 0


def _check_began(command: list[str], outcome: verify.Outcome) -> None:
    """Raise `UsageError` where a command failed before it trained at all: that is no proof, as with a misspelt name."""
    if outcome.error and not outcome.began:
        raise UsageError(f"{shlex.join(command)} fails before it trains: {outcome.error}")


def _row(
    name: str, reference: verify.Outcome | None, outcome: verify.Outcome, tolerance: float, repeats: str
) -> verify.Comparison | None:
    """Print a run's row; return its comparison where it fails."""
    if reference is None or outcome.error:
        verdict = "FAIL" if outcome.error else "reference"
        print(f"{name:<16}{'-':>14}{'-':>16}  {repeats:<9}{verdict}", flush=True)
        return verify.Comparison(float("inf"), 1, float("inf"), "") if outcome.error else None
    found = verify.compare(reference, outcome, tolerance)
    passes = found.passes(tolerance)
    verdict = "pass" if passes else "FAIL"
    where = "" if passes else f", first at step {found.first_step}" if found.first_step else f", most in {found.tensor}"
    print(
        f"{name:<16}{found.loss:>14.2e}{found.weight:>16.2e}  {repeats:<9}{verdict}{where}",
        flush=True,
    )
    return None if passes else found


def _same_bits(a: verify.Outcome, b: verify.Outcome) -> bool:
    return (
        a.losses.tobytes() == b.losses.tobytes()
        and a.weights.keys() == b.weights.keys()
        and all(a.weights[name].tobytes() == b.weights[name].tobytes() for name in a.weights)
    )


if __name__ == "__main__":
    sys.exit(main())

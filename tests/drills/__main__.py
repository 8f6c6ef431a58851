"""Every drill, and the table of what each found: `make drills`, some hours; a tenth of the times with `--share 0.1`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.drills import corruption, elastic, faults, kills, stops
from tests.drills.report import Drill, table

RESULTS = Path(__file__).parent / "results.md"
GROUPS = ("faults", "kills", "stops", "corruption", "elastic")


def run(group: str, share: float) -> Iterator[Drill]:
    """The drills of a group, at this share of the full number of times."""

    def times(full: int) -> int:
        return max(1, round(full * share))

    if group == "faults":
        yield from faults.drills(times(4))
    elif group == "kills":
        yield from kills.drills(times(200))
    elif group == "stops":
        yield from stops.drills(times(40))
        yield from stops.drills(times(5), recipes=["linear_regression_torch"], launcher="horovodrun")
        yield from stops.drills(times(5), recipes=["linear_regression_torch"], launcher="horovodrun-gloo")
        yield from stops.drills(times(10), recipes=["linear_regression_torch"], signals=[signal.SIGINT])
    elif group == "corruption":
        yield from corruption.drills(times(200))
    else:
        yield from elastic.drills(times(5))


def main() -> None:
    """Run the groups asked for; the exit code is 1 where a drill found something else than promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="|".join(GROUPS), help="which (default: all)")
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of times (default: 1.0)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the table goes (default: %(default)s)")
    given = parser.parse_args()
    unknown = [group for group in given.groups if group not in GROUPS]
    if unknown:
        parser.error(f"there are no drills named {unknown[0]}: choose among {', '.join(GROUPS)}")
    drills: list[Drill] = []
    for group in given.groups or GROUPS:
        for drill in run(group, given.share):
            drills.append(drill)
            print(table([drill]), flush=True)
    text = table(drills)
    given.output.write_text(text + "\n")
    print(f"\n{text}")
    sys.exit(any(drill.failures for drill in drills))


if __name__ == "__main__":
    main()

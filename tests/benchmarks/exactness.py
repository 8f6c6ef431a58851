"""What the proof costs: checkpoints, checks that ranks agree, --deterministic.

    python -m tests.benchmarks.exactness            # make bench: writes tests/benchmarks/results/exactness.md, .json
    python -m tests.benchmarks.exactness --short    # a look at whether it runs; writes nothing

Everything compared runs in turns, in the same processes or in neighbouring ones, and is given as a share of
the time of the same run without it: the machine's own speed cancels out.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def launch(size, *arguments):
    """Run the worker on `size` ranks; gives the figures that it prints."""
    mpirun = Path(sys.executable).with_name("mpirun")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PYTHONPATH": str(ROOT)}
    root["HVDKIT_DEVICE"] = "cpu"  # at all sizes
    worker = Path(__file__).with_name("exactness_worker.py")
    command = [mpirun, "-np", size, "--oversubscribe", "--bind-to", "none", sys.executable, worker, *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **root},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(re.search(r"^figures (.*)$", done.stdout, flags=re.M)[1])


def spread(values, unit=""):
    """Median, the middle half of the values, and the worst of them."""
    quarter, median, three_quarters = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return f"{median:.3g}{unit} ({quarter:.3g} … {three_quarters:.3g}; worst {max(values):.3g})"


def measure(short):
    """All figures, and the rows of the table."""
    pairs, steps, runs = (2, 100, 1) if short else (80, 100, 5)
    figures, rows = {}, []
    for framework in ("torch", "tensorflow"):
        found = launch(2, framework, "costs", pairs, steps)
        figures[framework] = found
        rows += [
            (f"CNN, {framework}: a step", spread(found["milliseconds_per_step"], " ms")),
            ("– of 100 steps' time: one checkpoint, written meanwhile", spread(found["checkpoint_percent"], " %")),
            ("– until training goes on after a checkpoint", spread(found["checkpoint_milliseconds"], " ms")),
            ("– one check that ranks agree", spread(found["check_milliseconds"], " ms")),
            ("– of the time: checks as often as by default", spread(found["check_percent"], " %")),
        ]
        ratios = []
        for _ in range(runs):
            plain, deterministic = (
                launch(3, framework, "steps", 15, steps, *flag) for flag in ([], ["--deterministic"])
            )
            ratios.append(100 * (statistics.median(deterministic) / statistics.median(plain) - 1))
        figures[framework]["deterministic_percent"] = ratios
        rows.append(("– 3 workers, of a step's time: --deterministic", spread(ratios, " %")))
    memory = launch(1, "torch", "memory", 1, 1)
    figures["memory"] = memory
    rows.append(
        (
            f"Peak memory while a state of {memory['state_megabytes']:.0f} MB is saved, in copies of the state",
            f"{memory['extra_copies']:.2f}",
        )
    )
    return figures, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few repetitions, nothing written")
    options = parser.parse_args()
    figures, rows = measure(options.short)
    width = max(len(name) for name, _ in rows)
    lines = [f"| {'what':<{width}} | median (middle half; worst) |", f"|{'-' * (width + 2)}|---|"]
    lines += [f"| {name:<{width}} | {value} |" for name, value in rows]
    print("\n".join(lines))
    if not options.short:
        RESULTS.mkdir(exist_ok=True)
        machine = f"{os.cpu_count()} cores, shared with others; 2 workers but where it says otherwise.\n\n"
        (RESULTS / "exactness.md").write_text(f"# What the proof costs\n\n{machine}" + "\n".join(lines) + "\n")
        (RESULTS / "exactness.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How far `hvdkit plan` is from what runs take: here, over slow links between hosts, and in figures of others.

    python -m tests.benchmarks.plan_check           # writes tests/benchmarks/results/plan.md
    python -m tests.benchmarks.plan_check --short   # one run of each; writes nothing

Predictions are made from one worker's steps and from messages between two workers; then the same recipe is run on more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import published
from tests.hosts.cluster import INTERFACE, NAMES, Cluster, missing
from tests.launching import ROOT, clean_environment
from toolkit import step_times, tuning
from toolkit.plan.measure import WARM_UP

RESULTS = Path(__file__).parent / "results" / "plan.md"
RECIPES = ("cnn_torch", "linear_regression_torch")
BATCH = "32"  # samples of a step on each worker
RATE, DELAY = 10e6, 0.002  # bits per second and seconds, of what each host sends
STEPS, WINDOW = 30, 10
ONE_CORE = {tuning.THREADS: "1"}  # for each worker: the hosts are one machine, whose cores each takes for its own
# Open MPI's numbers for them; by itself it chooses among more.
FORCED = {"ring": 4, "tree": 3}


def forced(algorithm):
    """Variables that have Open MPI take this all-reduce, whatever it would choose; tree is recursive doubling."""
    return {
        "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
        "OMPI_MCA_coll_tuned_allreduce_algorithm": str(FORCED[algorithm]),
        "OMPI_MCA_coll": "self,basic,libnbc,tuned,inter",  # the one that knows these rules
    }


def plan_words(file, recipe, *options):
    """A plan's command, whose figures come to lie in `file`."""
    words = ["-m", "toolkit.cli", "plan", "--json", file, "--steps", STEPS, *options]
    return [str(w) for w in ["python", *words, "--", "python", f"recipes/{recipe}.py", "--batch-size", BATCH]]


def run_words(directory, recipe):
    """A run's command for one worker, beside whose `directory` its step times come to lie."""
    words = [f"recipes/{recipe}.py", "--batch-size", BATCH, "--max-steps", WARM_UP + STEPS, "--epochs", 10000]
    return [str(w) for w in ["python", *words, "--check-sync", "0", "--output", directory]]


def predicted(file, workers):
    """Seconds of a step by each all-reduce, without overlap, which recipes do not have, and without compression."""
    steps = json.loads(file.read_text())["steps"]
    plain = [s for s in steps if (s["workers"], s["buckets"], s["compression"]) == (workers, 1, "none")]
    return {step["all_reduce"]: step["seconds"] for step in plain}


def measured(directory):
    """Seconds of each step."""
    return step_times.seconds_of_steps(Path(f"{directory}.times"), WARM_UP)


def undisturbed(found):
    """Seconds of a step in that window of all runs in which the machine disturbed them least: its steps' median."""
    windows = [steps[i : i + WINDOW] for steps in found for i in range(0, len(steps), WINDOW)]
    return min(map(statistics.median, windows))


def here(words, environment=None):
    """Run a command on this machine to its end."""
    full = {**clean_environment(), **(environment or {})}
    done = subprocess.run(words, env=full, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")


def on_this_machine(directory, runs):
    """Rows (what, predicted, measured) for 1, 2 and 4 workers here."""
    for recipe in RECIPES:
        for workers in (1, 2, 4):
            file, found = directory / f"{recipe}-{workers}.json", []
            here(plan_words(file, recipe, "--workers-per-host", workers, "--max-workers", workers))
            for number in range(runs):
                place = directory / f"{recipe}-{workers}-{number}"
                mpirun = ["mpirun", "-np", str(workers), "--oversubscribe", "--bind-to", "none"] if workers > 1 else []
                here([*mpirun, *run_words(place, recipe)], {step_times.VARIABLE: f"{place}.times"})
                found.append(measured(place))
            yield f"`{recipe}`, {workers} here", min(predicted(file, workers).values()), found


def over_slow_links(cluster, runs, recipe="cnn_torch", algorithms=tuple(FORCED)):
    """Rows (what, predicted, measured) for 2 and 3 hosts whose links are slow, by each all-reduce."""
    for name in NAMES:
        cluster.shape(name, RATE, DELAY)
    file = cluster.directory / "plan.json"
    options = ["-H", "node1,node2", "--interface", INTERFACE, "--max-workers", "4"]
    seen = cluster.run("node1", plan_words(file, recipe, *options), environment=ONE_CORE, timeout=1200)
    assert seen.returncode == 0, seen.stderr[-3000:]
    plan = json.loads(file.read_text())
    for workers in (2, 3):
        for algorithm in algorithms:
            found = []
            for number in range(runs):
                place = cluster.directory / f"{algorithm}-{workers}-{number}"
                sent = [word for name in forced(algorithm) for word in ("--env", name)]
                words = ["hvdkit", "launch", "-H", ",".join(NAMES[:workers]), "--interface", INTERFACE, *sent, "--"]
                environment = {step_times.VARIABLE: f"{place}.times", **forced(algorithm), **ONE_CORE}
                done = cluster.run("node1", [*words, *run_words(place, recipe)], environment=environment)
                assert done.returncode == 0, done.stderr[-3000:]
                found.append(measured(place))
            yield f"`{recipe}`, {workers} hosts, {algorithm}", from_figures(plan, workers, algorithm), found


def from_figures(plan, workers, algorithm):
    """A step's seconds by the formulas: a plan has no row for 3 workers, nor for the tree that was not its choice."""
    from toolkit.plan import cost

    network = cost.Link(**plan["links"]["network"])
    links = cost.Links(network, network)
    way = {"ring": cost.ring, "tree": cost.recursive_doubling}[algorithm]
    return plan["compute"]["seconds"] + links.agreement(workers) + way(links, workers, plan["gradient_bytes"]).seconds


def table(rows):
    """As markdown, with the prediction's error; each row is printed when it is there."""
    head = ["run", "predicted, ms", "undisturbed, ms", "error", "each run's median, ms", "error"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for what, guess, found in rows:
        quickest, medians = undisturbed(found), [statistics.median(steps) for steps in found]
        each = ", ".join(f"{seconds * 1e3:.3g}" for seconds in medians)
        cells = [what, f"{guess * 1e3:.3g}", f"{quickest * 1e3:.3g}", f"{guess / quickest - 1:+.0%}", each]
        lines.append("| " + " | ".join([*cells, f"{guess / statistics.median(medians) - 1:+.0%}"]) + " |")
        print(lines[-1], flush=True)
    return lines


def others():
    """Published efficiencies beside the model's, as markdown."""
    lines = ["| network, GPUs | published | model | error | at 14 µs a message | nothing hidden |", "|" + "---|" * 6]
    for row in published.ROWS:
        found = published.predicted(row)
        lines.append(
            f"| {row} | {row.efficiency:.1%} | {found:.1%} | {found / row.efficiency - 1:+.1%} | "
            f"{published.predicted(row, published.LATEST):.1%} | {published.without_overlap(row):.1%} |"
        )
    return lines


TEXT = """# How far `hvdkit plan` is from what was measured

Written by `make plan-check` on {cores} cores that others use too.

## Runs on this machine, {batch} samples a worker

A step's compute time is of one worker while as many more train beside it as the run has; nothing overlaps. Which
all-reduce Open MPI takes between processes of one machine is its own choice; predicted is the quicker of ring and tree.
Undisturbed is the least of the medians of {window} steps in a row; where the runs' medians are far above it, the
machine was busy with something else.

{here}

## Runs over links of {mbit:g} Mbit/s and {delay:g} ms, a worker a host

Open MPI was told which all-reduce to take: a ring, or recursive doubling.

{slow}

## Figures published with Horovod

512 GPUs and fewer, 25 Gbit/s RoCE, 4 Pascal GPUs a server, 64 images a GPU. Sources and assumptions, which are the same
for all rows, are in [published.py](../published.py): a ring of NCCL's latency, 64 MB buckets during the backward pass,
no tuned factor. The model says too much everywhere but once: it has no late workers and takes gradients to come evenly,
while three quarters of VGG-16's are one tensor that is not cut. Its largest error is VGG-16's on 512, where a seventh
of an exchange is latency, for which NCCL's own versions say 6.6 to 14 µs. The last column is the bound without overlap.

{others}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one run of each, nothing written")
    short = parser.parse_args().short
    runs = 1 if short else 3
    with tempfile.TemporaryDirectory(prefix="plan-check-") as name:
        directory = Path(name)
        rows = table(on_this_machine(directory, runs))
        reason = missing()
        if reason is None:
            (directory / "cluster").mkdir()
            with Cluster(directory / "cluster") as cluster:
                slow = table(over_slow_links(cluster, runs))
        else:
            slow = [f"Left out: {reason}."]
    if short:
        return 0
    figures = {"window": WINDOW, "cores": os.cpu_count(), "batch": BATCH, "mbit": RATE / 1e6, "delay": DELAY * 1e3}
    parts = {"here": "\n".join(rows), "slow": "\n".join(slow), "others": "\n".join(others())}
    RESULTS.write_text(TEXT.format(**figures, **parts))
    print(f"written to {RESULTS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

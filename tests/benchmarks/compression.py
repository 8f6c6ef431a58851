"""What compression of gradients costs and gives between two hosts, over links of several bandwidths.

    python -m tests.benchmarks.compression           # make bench: writes results/compression.md and .json
    python -m tests.benchmarks.compression --short   # a look at whether it runs; writes nothing

The hosts are network namespaces and the links shaped in user space (tests/hosts). Schemes take turns within a run, so
that what else the machine does slows all of them.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

from tests.hosts.cluster import INTERFACE, Cluster, missing
from tests.launching import ROOT
from toolkit import tuning
from toolkit.compression import NAMES
from toolkit.plan.cost import Link, Links
from toolkit.plan.schemes import Compression, Gradients
from toolkit.plan.step import Compute, Training

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).with_name("compression_worker.py")
HOSTS = ("node1", "node2")
WIDTHS = 1024, 1536, 1024, 10  # 3.2 million parameters, 12.6 MB
# Bits per second of what each host sends, up to what the shaping keeps up with beside two workers; None: not shaped.
RATES = (100e6, 300e6, 1e9, None)
DELAY = 100e-6  # seconds
ROUNDS, STEPS = 5, 2  # turns of each scheme, and steps of a turn


def measure(cluster, rate, rounds, steps, widths=WIDTHS):
    """What a worker found on links of this rate, and what it printed."""
    if rate is not None:
        for name in HOSTS:
            cluster.shape(name, rate, DELAY)
    file = cluster.directory / "found.json"
    words = ["hvdkit", "launch", "-H", ",".join(HOSTS), "--interface", INTERFACE, "--"]
    one_core = {tuning.THREADS: "1"}  # for each worker: the hosts are one machine, whose cores each takes for its own
    done = cluster.run("node1", [*words, "python", WORKER, file, rounds, steps, *widths], environment=one_core)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text()), done.stdout


def seconds(found, name):
    return statistics.median(found["seconds_per_step"][name])


def expected(found, name):
    """Seconds of a step by the toolkit's measurement: computing, arithmetic, and the bytes at the link's rate."""
    sent = 8 * found["bytes_said"][name] / found["bits_per_second"]
    return seconds(found, "alone") + found["arithmetic_seconds"][name] + sent


def pays_below(found, name, widths=WIDTHS):
    """Mbit/s below which a scheme pays as `hvdkit plan` has it, from the arithmetic that was measured."""
    shapes = [shape for inputs, outputs in itertools.pairwise(widths) for shape in ((outputs, inputs), (outputs,))]
    link = Link.of(DELAY, found["bits_per_second"])
    training = Training(Compute(seconds(found, "alone")), Gradients.of(shapes), Links(link, link))
    more = found["arithmetic_seconds"][name] - found["arithmetic_seconds"]["none"]
    return training.pays_below(len(HOSTS), Compression(name, max(0.0, more))) / 1e6


def break_even(every, name):
    """Mbit/s below which a scheme's step was shorter than none's, and "over " or "under " where no link was near it.

    The difference is a straight line in seconds per bit, here between neighbouring links.
    """
    line = sorted((1 / found["bits_per_second"], seconds(found, "none") - seconds(found, name)) for found in every)
    for (x, gain), (next_x, next_gain) in itertools.pairwise(line):
        if gain <= 0 < next_gain:
            return 1e-6 / (x - gain * (next_x - x) / (next_gain - gain)), ""
    fastest, slowest = 1e-6 / line[0][0], 1e-6 / line[-1][0]
    return (fastest, "over ") if line[0][1] > 0 else (slowest, "under ")


def mbit(number):
    return "any" if math.isinf(number) else f"{float(f'{number:.2g}'):,.0f}"


def title(found):
    rate = found["rate"]
    shaped = "not shaped" if rate is None else f"{mbit(rate / 1e6)} Mbit/s"
    return f"{shaped} ({mbit(found['bits_per_second'] / 1e6)})"


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def ms(seconds):
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def spread(values):
    return f"{ms(statistics.median(values))} ({ms(min(values))} … {ms(max(values))})"


def steps_table(every):
    """Milliseconds of a step: median and range of the turns, and what was expected."""
    rows = []
    for name in ("alone", *NAMES):
        cells = [spread(found["seconds_per_step"][name]) for found in every]
        if name != "alone":
            cells = [f"{cell}; {ms(expected(found, name))}" for cell, found in zip(cells, every, strict=True)]
        rows.append([f"`{name}`" if name != "alone" else "no exchange", *cells])
    return table(["", *map(title, every)], rows)


def pays_table(every):
    """Bytes as said and as counted, and from which bandwidth down it pays, as predicted and as measured."""
    rows = []
    for name in NAMES:
        said = every[0]["bytes_said"][name]
        counted = [statistics.median(found["bytes_counted"][name]) / said - 1 for found in every]
        cells = [f"`{name}`", f"{said / 1e6:.3g}", f"{min(counted):+.1%} … {max(counted):+.1%}"]
        if name == "none":
            rows.append([*cells, "", "", ""])
            continue
        guess = statistics.median(pays_below(found, name) for found in every)
        measured, bound = break_even(every, name)
        error = "" if bound or math.isinf(guess) else f"{guess / measured - 1:+.0%}"
        rows.append([*cells, mbit(guess), f"{bound}{mbit(measured)}", error])
    return table(["", "MB a step, said", "counted", "pays below, predicted", "measured", "error"], rows)


TEXT = """# What compression costs and gives

Written by `make bench BENCH=compression` on {cores} cores that others use too. Two workers on two hosts, which are
network namespaces of one machine; {parameters:,} parameters; MPI adds up. Schemes take turns, {turns} of them.

Milliseconds a step, median (and range) of the turns; after the semicolon what the toolkit's own measurement expects:
the step without exchange, the scheme's arithmetic, and its bytes at the link's rate. In the head are the rate that the
link was given and, in parentheses, what a plain sum of as many values reached, in Mbit/s, which is what counts here.

{steps_table}

Counted are the bytes that left by the interface, over those that the toolkit says; headers and what TCP sent again
are in them. A scheme pays on links below so many Mbit/s, as `hvdkit plan` has it from that arithmetic, and as the steps
above have it.

{pays_table}
"""


def report(every):
    """The results of links, fastest last, as markdown."""
    return TEXT.format(
        cores=os.cpu_count(),
        parameters=every[0]["parameters"],
        turns=len(every[0]["seconds_per_step"]["none"]),
        steps_table=steps_table(every),
        pays_table=pays_table(every),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two links, few steps, nothing written")
    short = parser.parse_args().short
    if (reason := missing()) is not None:
        sys.exit(f"there are no hosts to measure between: {reason}")
    rounds, steps, every = (2, 1, []) if short else (ROUNDS, STEPS, [])
    for rate in RATES[-2:] if short else RATES:
        with tempfile.TemporaryDirectory(prefix="compression-") as name, Cluster(Path(name)) as cluster:
            found, _ = measure(cluster, rate, rounds, steps)
        every.append({"rate": rate, **found})
        print(f"{title(every[-1])}: " + ", ".join(f"{n} {ms(seconds(found, n))} ms" for n in NAMES), flush=True)
    text = report(every)
    print(text)
    if not short:
        (RESULTS / "compression.md").write_text(text)
        (RESULTS / "compression.json").write_text(json.dumps(every, indent=1) + "\n")
        print(f"written to {(RESULTS / 'compression.md').relative_to(ROOT)}")


if __name__ == "__main__":
    main()

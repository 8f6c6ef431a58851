"""`hvdkit plan`: formulas against a simulation of every message, flags, mistakes, and figures that others published."""

import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import message_simulation as simulation
from tests.benchmarks import published
from toolkit import compression
from toolkit.cli import main
from toolkit.errors import UsageError
from toolkit.plan import cost, measure, plot, step
from toolkit.plan.cost import Link, Links
from toolkit.plan.schemes import Compression, Gradients
from toolkit.plan.step import Compute, Training

LENGTH = 960  # values, which all parts divide
VALUE = 1000.0  # bytes of one
NETWORKS = [Link(20e-6, 1e-9), Link(5e-3, 1e-6), Link(1e-7, 1e-8)]
LOCAL = Link(2e-6, 2e-10)
ALL_TOLD = ["--compute-ms", "100", "--gradient-mb", "100", "--latency-us", "20", "--gbit", "10"]


def simulated(links, programs):
    """Seconds, after the sum was seen to be right on every worker."""
    vectors = [np.arange(LENGTH) * (i + 1.0) for i in range(len(programs))]
    expected = sum(vectors)
    seconds = simulation.run(links, programs, vectors, VALUE)
    assert all(np.array_equal(vector, expected) for vector in vectors)
    return seconds


WHOLE = slice(0, LENGTH)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize(
    ("workers", "on_host"), [(1, 1), (2, 1), (3, 1), (6, 1), (8, 1), (2, 2), (4, 2), (8, 4), (6, 3), (16, 4)]
)
def test_all_reduces_against_their_messages(workers, on_host, network):
    links, size = Links(network, LOCAL, on_host), LENGTH * VALUE
    around = simulation.ring(range(workers), WHOLE)
    found = {"ring": (cost.ring, [around[i] for i in range(workers)])}
    if not (workers & (workers - 1)) or on_host == 1:
        found["doubling"] = (cost.recursive_doubling, simulation.recursive_doubling(workers, WHOLE))
        found["halving"] = (cost.rabenseifner, simulation.rabenseifner(workers, WHOLE))
    for name, (formula, programs) in found.items():
        assert formula(links, workers, size).seconds == pytest.approx(simulated(links, programs), rel=1e-6), name


@pytest.mark.parametrize("network", NETWORKS, ids=str)
@pytest.mark.parametrize(("workers", "on_host"), [(4, 2), (8, 2), (8, 4), (6, 3), (16, 4)])
def test_hierarchical_against_its_messages(workers, on_host, network, monkeypatch):
    monkeypatch.setattr(cost, "tree", lambda *_: None)  # a ring between the hosts, as in the simulation
    links = Links(network, LOCAL, on_host)
    seconds = simulated(links, simulation.hierarchical(workers, on_host, WHOLE))
    assert cost.hierarchical(links, workers, LENGTH * VALUE).seconds == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize(("workers", "on_host"), [(2, 1), (8, 1), (8, 2), (16, 4), (4, 4)])
def test_exchanges_of_what_can_not_be_summed_against_their_messages(workers, on_host):
    links = Links(NETWORKS[0], LOCAL, on_host)
    vectors = [np.concatenate([np.full(LENGTH, i), np.zeros(LENGTH)]) for i in range(workers)]
    seconds = simulation.run(links, simulation.all_to_all(workers, WHOLE), vectors, VALUE)
    for i, vector in enumerate(vectors):
        got = vector[LENGTH:].reshape(workers, -1)
        assert all((got[j] == (0 if i == j else j)).all() for j in range(workers))
    assert cost.all_to_all(links, workers, LENGTH * VALUE) == pytest.approx(seconds, rel=1e-6)
    gathered = simulation.ring(range(workers), WHOLE, scatter=False)
    seconds = simulation.run(links, [gathered[i] for i in range(workers)], [np.zeros(LENGTH)] * workers, VALUE)
    assert cost.all_gather(links, workers, LENGTH * VALUE / workers) == pytest.approx(seconds, rel=1e-6)


@given(backward=st.floats(1e-4, 1), buckets=st.integers(1, 64), latency=st.floats(0, 1e-2), gbit=st.floats(0.001, 400))
def test_overlap_against_bucket_after_bucket(backward, buckets, latency, gbit):
    links = Links(Link.of(latency, gbit * 1e9), LOCAL)
    training = Training(Compute(backward, backward=1.0), Gradients(1e7), links)
    one = cost.ring(links, 4, 1e7 / buckets).seconds
    found = training.step(4, "ring", Compression(), buckets)
    assert found.seconds == pytest.approx(simulation.last_bucket(backward, buckets, one))


@given(
    workers=st.sampled_from([1, 2, 4, 8, 64, 1024]),
    on_host=st.sampled_from([1, 2, 4]),
    latency=st.floats(0, 1e-2),
    gbit=st.floats(0.001, 400),
    seconds=st.floats(1e-4, 10),
)
def test_no_way_is_better_than_no_exchange(workers, on_host, latency, gbit, seconds):
    links = Links(Link.of(latency, gbit * 1e9), LOCAL, on_host)
    training = Training(Compute(seconds, 32), Gradients(1e8), links)
    plain, hidden = training.best(workers), training.best(workers, overlap=True)
    assert seconds <= hidden.seconds <= plain.seconds * step.NEARLY
    assert 0 < plain.efficiency <= 1 + 1e-9
    ring = cost.ring(links, workers, 1e8).seconds
    assert ring * (1 + 1e-9) >= 2 * (workers - 1) / workers * 1e8 * min(LOCAL.seconds_per_byte, 8 / gbit / 1e9)


def test_known_values():
    """By hand: 8 workers on a network of 10 µs and 1 GB/s, 80 MB."""
    links = Links(Link(10e-6, 1e-9), LOCAL)
    assert cost.ring(links, 8, 80e6).seconds == pytest.approx(14 * (10e-6 + 0.010))
    assert cost.recursive_doubling(links, 8, 80e6).seconds == pytest.approx(3 * (10e-6 + 0.080))
    assert cost.rabenseifner(links, 8, 80e6).seconds == pytest.approx(6 * 10e-6 + 0.140)
    assert cost.tree(links, 8, 80e6).algorithm == "Rabenseifner"
    assert cost.tree(links, 8, 8).algorithm == "doubling"
    assert cost.all_gather(links, 8, 80e6) == pytest.approx(7 * (10e-6 + 0.080))


def test_agreement_is_of_each_operation():
    network, local = Link(0.0, 1e-9, agreement=3e-3), Link(0.0, 1e-10, agreement=1e-3)
    links = Links(network, local, 4)
    assert links.agreement(1) == 0
    assert links.agreement(2) == pytest.approx(1e-3)
    assert links.agreement(16) == pytest.approx(2 * 1e-3 + 2 * 3e-3)
    for name, operations in (("none", 1), ("powersgd", 2)):
        found = Compression(name).exchange("ring", links, 16, 1e3).seconds
        alone = operations * cost.ring(links, 16, 1e3 / operations).seconds
        assert found - alone == pytest.approx(operations * 8e-3)


class Recorder:
    """A wire to workers that hold what this one holds; it notes the operations and their bytes."""

    def __init__(self, size):
        self.rank, self.size, self.calls = 0, size, []

    def sum(self, array):
        self.calls.append(("sum", array.nbytes))
        array *= self.size

    def all_to_all(self, send, received):
        self.calls.append(("all_to_all", send.nbytes))
        received[...] = send

    def all_gather(self, send, received):
        self.calls.append(("all_gather", send.nbytes))
        received[...] = send


SHAPES = [(256, 256), (256,), (3, 3, 64, 96), (96,)]


@pytest.mark.parametrize("all_reduce", cost.ALL_REDUCES)
@pytest.mark.parametrize("name", compression.NAMES)
def test_an_exchange_is_planned_as_the_compression_makes_it(name, all_reduce):
    """The operations that a step of the compression makes, each by its formula, are the planned ones."""
    links, workers, gradients = Links(Link(20e-6, 3.2e-10, agreement=1e-4), LOCAL, 8), 64, Gradients.of(SHAPES)
    wire = Recorder(workers)
    values = np.random.default_rng(0).standard_normal(int(gradients.size / 4), np.float32)
    compression.make(name, SHAPES).average(values, wire)
    made = {
        "sum": lambda size: cost.ALL_REDUCES[all_reduce](links, workers, size).seconds,
        "all_to_all": lambda size: cost.all_to_all(links, workers, size),
        "all_gather": lambda size: cost.all_gather(links, workers, size),
    }
    seconds = sum(links.agreement(workers) + made[operation](size) for operation, size in wire.calls)
    scheme = Compression(name)
    planned = scheme.exchange(all_reduce, links, workers, scheme.size(gradients)).seconds
    assert planned == pytest.approx(seconds, rel=0.05), wire.calls  # halves of PowerSGD's are not alike


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((100, 50), 150), ((64, 3, 3, 3), 64 + 27), ((3, 3, 512, 512), 3 * 3 * 512 + 512), ((5, 5, 1, 200), 25 + 200)],
)
def test_bytes_of_compressions(shape, matrix):
    """Kernels as torch has them (out, in, height, width), and as Keras has (height, width, in, out)."""
    gradients = Gradients.of([shape, (10,), (2, 2)])
    values = math.prod(shape) + 14
    assert gradients.size == 4 * values
    sizes = {name: Compression(name, rank=2).size(gradients) for name in ("none", "fp16", "bf16", "int8", "topk")}
    expected = {"none": 4 * values, "fp16": 2 * values, "bf16": 2 * values, "int8": values, "topk": 0.08 * values}
    assert sizes == {name: pytest.approx(size, abs=40) for name, size in expected.items()}, "scales, and rounding"
    assert Compression("powersgd", rank=2).size(gradients) == 4 * (2 * matrix + 14)


def test_bytes_of_gradients_whose_shapes_are_not_known():
    sizes = {name: Compression(name).size(Gradients(1e6)) for name in compression.NAMES}
    assert sizes == {"none": 1e6, "fp16": 5e5, "bf16": 5e5, "int8": 2.5e5, "topk": 2e4, "powersgd": None}


def test_strong_scaling_waits_for_the_largest_part():
    compute = Compute(0.100, samples=10, fixed=0.020, global_batch=10)
    assert compute.seconds_of(1) == pytest.approx(0.100)
    assert compute.seconds_of(4) == pytest.approx(0.020 + 0.080 * 3 / 10)  # parts of 3, 3, 2, 2
    assert compute.seconds_of(100) == pytest.approx(0.020 + 0.008)
    free = Training(compute, Gradients(1.0), Links(Link(0, 1e-15), Link(0, 1e-15)))
    assert free.best(4).efficiency == pytest.approx(0.100 / 0.044 / 4)


def test_a_compression_is_worth_what_it_saves():
    training = Training(Compute(0.1, 32), Gradients(100e6), Links(Link.of(20e-6, 1e9), LOCAL))
    most = training.affordable(8, Compression("fp16"))
    plain = training.best(8).seconds
    for cost_of_it, quicker in ((most * 0.99, True), (most * 1.01, False)):
        assert (training.best(8, compression=Compression("fp16", cost_of_it)).seconds < plain) == quicker
    assert training.affordable(1024, Compression("topk")) < 0, "a hundredth of the values, of a thousand workers"


@pytest.mark.parametrize(("workers", "on_host"), [(2, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("name", ["fp16", "int8", "topk"])
def test_below_its_break_even_a_compression_pays_and_above_it_does_not(name, workers, on_host):
    local, scheme = Link(2e-6, 1e-10), Compression(name, 0.02)

    def training(rate):
        return Training(Compute(0.1, 32), Gradients(100e6), Links(Link.of(20e-6, rate), local, on_host))

    limit = training(1e9).pays_below(workers, scheme)
    for rate, pays in ((0.99 * limit, True), (1.01 * limit, False)):
        steps = training(rate).best(workers), training(rate).best(workers, compression=scheme)
        assert (steps[1].seconds < steps[0].seconds) == pays
    assert training(1e9).pays_below(workers, Compression(name, 1e9)) == 0
    if (name, workers) == ("fp16", 2):  # by hand: half the bytes spared, for 20 ms
        assert limit == pytest.approx(8 * 50e6 / 0.02, rel=1e-3)


def test_what_each_worker_sends_to_each_leaves_a_full_host_by_one_link():
    """By hand, many hosts of 8 at 1 GB/s, 1 GB of gradients: as 16 bits 4 s to the owners, and half of one around."""
    fast = Link(0.0, 1e-15)
    training = Training(Compute(0.1, 32), Gradients(1e9), Links(Link(0.0, 1e-9), fast, 8))
    fp16, none = (training.best(8192, compression=Compression(name)).seconds - 0.1 for name in ("fp16", "none"))
    assert fp16 == pytest.approx(4.5, rel=0.01) and none == pytest.approx(2.0, rel=0.01)
    assert training.pays_below(8192, Compression("fp16")) == 0


def test_counts_fill_hosts():
    assert step.worker_counts(1, 8) == [1, 2, 4, 8]
    assert step.worker_counts(6, 30) == [1, 2, 4, 6, 12, 24]
    assert step.worker_counts(4, 4) == [1, 2, 4]
    with pytest.raises(UsageError, match="fill hosts of 4"):
        cost.ring(Links(LOCAL, LOCAL, 4), 6, 1.0)


# --- the command


def told(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_with_all_told_nothing_is_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")  # nothing could be
    out = told(capsys, *ALL_TOLD, "--batch", "32", "--json", str(tmp_path / "plan.json"), "--", "no-such-recipe",
               "--batch-size", "32")  # fmt: skip
    rows = {row.split()[0]: row.split() for row in out.splitlines() if row.strip() and row.split()[0].isdecimal()}
    assert set(rows) == {str(1 << i) for i in range(11)}
    document = json.loads((tmp_path / "plan.json").read_text())
    ring = next(s for s in document["steps"] if s["workers"] == 8 and s["compression"] == "none" and s["buckets"] == 1)
    assert ring["seconds"] == pytest.approx(0.1 + 14 * (20e-6 + 100e6 / 8 * 8 / 10e9))
    assert ring["samples_per_second"] == pytest.approx(8 * 32 / ring["seconds"])
    assert "100 ms a step" in out and "as told" in out


def test_the_verdict_is_of_the_table(capsys):
    """At 1 Gbit/s and 100 MB a step of 100 ms gains nothing from workers; at 400 Gbit/s all pay."""
    common = ["--compute-ms", "100", "--gradient-mb", "100", "--latency-us", "2", "--max-workers", "64"]
    assert "Without overlap more than 1 worker does not pay" in told(capsys, *common, "--gbit", "1")
    fast = told(capsys, *common, "--gbit", "400")
    assert "Without overlap 64 workers pay" in fast and "With overlap 64 workers pay" in fast


def test_a_compression_that_is_told_its_cost(capsys):
    out = told(capsys, *ALL_TOLD, "--compression-ms", "fp16=1", "--compression-ms", "int8=500")
    assert "pay? A step: fp16 saves" in out and "int8 loses" in out and "bf16 if it costs less than" in out
    (line,) = [line for line in out.splitlines() if line.startswith("Between hosts it pays on 2 workers")]
    assert line.endswith("fp16 below 3.9e+02 Gbit/s, int8 below 1.2 Gbit/s.")


def test_one_step_of_a_fixed_batch(capsys):
    out = told(capsys, *ALL_TOLD, "--scaling", "strong", "--batch", "64", "--max-workers", "4")
    assert "64 samples over all workers" in out
    assert [row.split()[1] for row in out.splitlines() if row.split()[:1] == ["4"]][0] == "25"


@pytest.fixture
def links_of_memory(monkeypatch):
    """In place of measuring: 1 µs and 50 Gbit/s, wherever."""
    found = measure.Between(Link.of(1e-6, 50e9), measure.Spread(1e-3, 1e-3, 1e-3), 4_000_000, 1e-6, "mpi")
    monkeypatch.setattr(measure, "between", lambda *_: found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the latency and rate between hosts is that of the memory of this machine. "),
        (["--gbit", "25"], "the latency between hosts is that of the memory of this machine. "),
        (["-H", "node1:4"], "the latency and rate between hosts is that of the memory of node1. "),
        (["--gbit", "25", "--latency-us", "20"], ""),
        (["-H", "node1:4,node2:4"], ""),
        (["--workers-per-host", "8", "--max-workers", "8"], ""),
    ],
)
def test_memory_that_stands_for_a_network_is_told_with_the_verdict(arguments, said, links_of_memory, capsys):
    out = told(capsys, "--compute-ms", "100", "--gradient-mb", "100", "--max-workers", "16", *arguments)
    last = out.splitlines()[-1]
    assert last.startswith("For a network this is no plan: ") == bool(said) and said in last
    assert ("in its memory in place of a network" in out) == (bool(said) or "8" in arguments)


RECIPE_ON_GPU = """
import json, os, sys
from pathlib import Path
import numpy as np
from toolkit import checkpoint, step_times

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
steps = int(given.get("--max-steps", 20))
state = {"model/w": np.full((3, 2), steps, np.float32)}
checkpoint.write(Path(given["--output"]), steps, state, {"global_batch_size": 4, "framework": "torch"}, 1)
times = {"seconds": [0.01] * steps, "device": "gpu"}
Path(os.environ[step_times.VARIABLE]).write_text(json.dumps(times))
"""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "links are measured between CPUs alone: give --latency-us and --gbit, or"),
        (["--workers-per-host", "2"], "which 2 at a time would share: measure it without --workers-per-host"),
    ],
)
def test_what_is_not_measured_on_gpus_is_refused(arguments, text, tmp_path, capsys):
    script = tmp_path / "recipe.py"
    script.write_text(RECIPE_ON_GPU)
    command = ["--steps", "5", "--scaling", "weak", *arguments, "--", sys.executable, str(script)]
    assert main(["plan", *command]) == 2
    said = capsys.readouterr()
    assert text in said.err and said.err.count("\n") == 1, said.err
    if not arguments:
        assert "workers pay" in told(capsys, "--latency-us", "2", "--gbit", "100", *command)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "nothing to plan"),
        (["--compute-ms", "5"], "--gradient-mb"),
        ([*ALL_TOLD, "--scaling", "strong"], "--batch"),
        ([*ALL_TOLD, "--", "python", "recipe.py"], "--batch"),  # which keeps its global batch
        ([*ALL_TOLD, "--backward-share", "1.5"], "--backward-share is 1.5"),
        ([*ALL_TOLD, "--top-k", "0"], "--top-k is 0"),
        ([*ALL_TOLD, "--pays", "101"], "--pays is 101"),
        ([*ALL_TOLD, "--fixed-ms", "200"], "--fixed-ms is 200"),
        ([*ALL_TOLD, "--bucket-mb", "0"], "--bucket-mb is 0"),
        ([*ALL_TOLD, "--workers-per-host", "8", "--max-workers", "4"], "--max-workers is 4"),
        ([*ALL_TOLD, "--plot", "plan.jpeg"], "--plot plan.jpeg"),
        ([*ALL_TOLD, "--json", "/nowhere/plan.json"], "/nowhere is no directory"),
        ([*ALL_TOLD, "--hostfile", "/nowhere/hosts"], "/nowhere/hosts"),
        (["--", "nowhere-to-be-found"], "nowhere-to-be-found can't be run"),
        (["--", "python", "recipe.py", "--max-steps=3"], "--max-steps"),
        (["--batch", "3", "--", "python", "recipe.py"], "--compute-ms"),
    ],
)
def test_a_mistake_is_one_line(arguments, text, capsys):
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr()
    assert text in said.err and said.err.count("\n") == 1 and not said.out, said.err


@pytest.mark.parametrize("flag", ["--compute-ms=x", "--gbit=-1", "--batch=0", "--compression-ms=zip=3", "--gbit=nan"])
def test_a_flag_that_is_no_number(flag, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["plan", *ALL_TOLD, flag])
    assert raised.value.code == 2 and "give" in capsys.readouterr().err


def test_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for kind in ("png", "svg"):
        file = tmp_path / f"plan.{kind}"
        assert told(capsys, *ALL_TOLD, "--plot", str(file)).endswith(f"\nwrote {file}\n")
        assert file.stat().st_size > 5000
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_a_plot_can_be_told_apart_and_its_title_fits(tmp_path, monkeypatch):
    """Also where they run one along another: bands each narrower than the one below, and dashes in turns."""
    figures = pytest.importorskip("matplotlib.figure")
    shown = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: shown.append(figure))
    training = Training(Compute(0.1, 32), Gradients(1e8), Links(NETWORKS[0], LOCAL, 4))
    plot.write(tmp_path / "plan.png", training, step.worker_counts(4, 64), "python recipe.py: 8 ms a step " * 9)
    (figure,) = shown
    for axes in figure.axes:
        ideal, *lines = axes.lines
        assert [line.get_label() for line in lines] == [n + o for o in ("", ", overlap") for n in cost.ALL_REDUCES]
        widths = [line.get_linewidth() for line in lines]
        assert widths[0] > widths[1] > widths[2] > widths[3] and all(line.get_alpha() for line in lines[:3])
        (on, off), offsets = lines[3]._unscaled_dash_pattern[1], [x._unscaled_dash_pattern[0] for x in lines[3:]]
        assert offsets == [0, on, 2 * on] and off == 2 * on
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend[0] == "each worker as fast as one" and len(legend) == 7
    figure.canvas.draw()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["plan", *ALL_TOLD, "--plot", str(tmp_path / "plan.png")]) == 2
    assert "pip install 'hvdkit[plot]'" in capsys.readouterr().err


# --- against figures of others


@pytest.mark.parametrize("row", published.ROWS, ids=str)
def test_against_published_figures(row):
    """The model's errors, pinned: a change of the model that moves them is to be looked at."""
    predicted = published.predicted(row)
    assert published.without_overlap(row) < row.efficiency < 1, "what can't be: slower than with nothing hidden"
    assert math.isclose(predicted, row.model, abs_tol=0.0006), (str(row), predicted)
    assert abs(predicted / row.efficiency - 1) < 0.14

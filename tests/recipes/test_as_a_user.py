"""The recipes' commands as users type them: launchers, output, mistakes, failures."""

import gzip
import struct

import numpy as np
import pytest

from tests.launching import ROOT, launch, some_long
from toolkit import datasets

TORCH = "recipes/cnn_torch.py"


def write_idx(path, array, dims=None, opened=open):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *(dims or array.shape))
    with opened(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    """A directory in MNIST's own format, of the digits that need no download."""
    directory = tmp_path / "mnist"
    directory.mkdir()
    for part, data in zip(("train", "t10k"), datasets.digits(), strict=True):
        images = np.round(data.x.reshape(-1, 28, 28) * 255)
        write_idx(directory / f"{part}-images-idx3-ubyte", images)
        write_idx(directory / f"{part}-labels-idx1-ubyte.gz", data.y, opened=gzip.open)
    return directory


@pytest.mark.parametrize("launcher", ["none", "mpirun", "horovodrun", "horovodrun-gloo"])
def test_every_launcher_trains_and_says_where_the_checkpoint_is(tmp_path, launcher):
    result = launch(2, [TORCH, "--epochs", "10", "--output", tmp_path / "new"], launcher=launcher)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if "epoch 10/10" in line]
    assert len(lines) == 1, "one line an epoch, from rank 0 alone"
    assert float(lines[0].split("test accuracy ")[1].split()[0]) >= 0.97
    assert f"checkpoint: {tmp_path}/new/step-00000450" in result.stdout
    assert "Traceback" not in result.stderr


def test_more_ranks_than_cores_by_a_hostfile(tmp_path):
    command = [TORCH, "--max-steps", "3", "--output", tmp_path / "new"]
    result = launch(5, command, options=["--hostfile", "hostfiles/localhost"])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "5 worker(s)" in result.stdout


def test_mnists_own_files(mnist, tmp_path):
    result = launch(2, [TORCH, "--data-dir", mnist, "--epochs", "6", "--output", tmp_path / "new"])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "epoch 6/6" in result.stdout


def truncate(directory):
    path = directory / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def lie(directory):
    write_idx(directory / "t10k-images-idx3-ubyte", np.zeros((2, 28, 28)), dims=(2**31, 28, 28))


def miscount(directory):
    write_idx(directory / "train-labels-idx1-ubyte.gz", np.zeros(3), opened=gzip.open)


MISTAKES = {
    "unknown flag": (["--nonsense"], None, "--nonsense"),
    "batch size of 0": (["--batch-size", "0"], None, "--batch-size is '0'"),
    "no data directory": (["--data-dir", "nowhere"], None, "nowhere"),
    "truncated file": (["--data-dir", "mnist"], truncate, "train-images-idx3-ubyte"),
    "lying header": (["--data-dir", "mnist"], lie, "t10k-images-idx3-ubyte"),
    "labels of other data": (["--data-dir", "mnist"], miscount, "train"),
    "nothing to resume": (["--resume"], None, "--resume found no run"),
}


SHORT = {"truncated file": 2, "nothing to resume": 2, "unknown flag": 1, "batch size of 0": 1, "lying header": 1}


@pytest.mark.parametrize(
    ("mistake", "size"),
    [pytest.param(m, n, marks=() if SHORT.get(m) == n else pytest.mark.long) for m in MISTAKES for n in (1, 2)],
)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(mistake, size, mnist, tmp_path):
    arguments, damage, named = MISTAKES[mistake]
    if damage:
        damage(mnist)
    before = sorted(tmp_path.rglob("*"))
    result = launch(size, [ROOT / TORCH, *arguments], launcher="none" if size == 1 else "mpirun", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    ours = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(ours) == 1 and named in ours[0], result.stderr
    if size == 1:
        assert result.stderr.count("\n") == 1 and not result.stdout, result.stderr
    assert sorted(tmp_path.rglob("*")) == before


# What TensorFlow says while it loads, before a recipe can parse its options.
TENSORFLOWS_OWN = ("WARNING: All log messages", "I0000 ", "To enable the following")


@pytest.mark.parametrize(
    "mistake",
    [
        "unknown flag",
        "lying header",
        *(pytest.param(m, marks=pytest.mark.long) for m in ("batch size of 0", "no data directory")),
    ],
)
@pytest.mark.parametrize("recipe", some_long(["cnn_tensorflow", "cnn_keras"], short=["cnn_tensorflow"]))
def test_a_mistake_is_one_line_in_every_framework(recipe, mistake, mnist, tmp_path):
    arguments, damage, named = MISTAKES[mistake]
    if damage:
        damage(mnist)
    before = sorted(tmp_path.rglob("*"))
    result = launch(1, [ROOT / f"recipes/{recipe}.py", *arguments], launcher="none", cwd=tmp_path)
    ours = [line for line in result.stderr.splitlines() if not line.startswith(TENSORFLOWS_OWN)]
    assert result.returncode == 2 and len(ours) == 1 and named in ours[0], result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_not_overwritten_and_not_resumed_as_another(tmp_path):
    command = [TORCH, "--max-steps", "2", "--output", tmp_path / "run"]
    assert launch(1, command, launcher="none").returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    for arguments, told in (
        ([], ["--resume"]),
        (["--resume", "--momentum", "0.5"], ["momentum 0.9", "momentum 0.5"]),
        (["--resume", "--seed", "1"], ["seed 0", "seed 1"]),
    ):
        result = launch(1, [*command, *arguments], launcher="none")
        assert result.returncode == 2 and all(text in result.stderr for text in told), result.stderr
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


FAILING = """
import sys, time
import toolkit.adapters.torch as dp
world = dp.start()
dp.average({"a": 1.0})
if world.rank == 1:
    raise RuntimeError("the disk of this rank is gone")
dp.average({"a": 1.0})
time.sleep(600)
"""


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("horovodrun", marks=pytest.mark.long), "horovodrun-gloo"])
def test_one_ranks_exception_ends_the_job_and_is_named(launcher, tmp_path):
    (tmp_path / "fails.py").write_text(FAILING)
    result = launch(3, [tmp_path / "fails.py"], launcher=launcher, timeout=60)
    assert result.returncode != 0
    assert "the disk of this rank is gone" in result.stderr and "rank 1 on" in result.stderr

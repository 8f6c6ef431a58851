"""The torch adapter on a GPU: alone, with Horovod's NCCL, and two workers that share it, through the host's memory."""

import functools
import json
import re
import shutil
import subprocess

import pytest

from tests.launching import ROOT, WORKERS, launch

LIST = ["nvidia-smi", "--list-gpus"]  # this process loads no framework
FOUND = subprocess.run(LIST, capture_output=True, text=True).stdout if shutil.which(LIST[0]) else ""
GPUS = FOUND.count("GPU ")
pytestmark = [
    pytest.mark.skipif(GPUS == 0, reason="this machine has no GPU"),
    pytest.mark.timeout(200),
]
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}  # convolutions and products in full float32, as on the CPU
CASES, OVERLAP = (
    re.findall(r"@case\ndef (\w+)", (WORKERS / worker).read_text()) for worker in ("torch_cases.py", "overlap_torch.py")
)
NEEDS_TWO = pytest.mark.skipif(GPUS < 2, reason="this machine has fewer than two GPUs")
# How gradients travel, and with how many workers: on one GPU the host's memory stands in NCCL's place.
IN_BUCKETS = [pytest.param(["--carried"], id="carried"), pytest.param([], marks=NEEDS_TWO, id="NCCL")]


def losses(size, output, *options):
    command = [ROOT / "recipes" / "cnn_torch.py", "--max-steps", "40", "--output", output, *options]
    result = launch(size, command, environment=EXACT)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "step" in row][:40]


@pytest.mark.parametrize("options", [["--device", "gpu"], ["--device", "auto"]])
def test_one_worker_on_a_gpu_is_one_on_the_cpu(options, tmp_path):
    wanted = losses(1, tmp_path / "cpu", "--device", "cpu")
    assert losses(1, tmp_path / "gpu", *options) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("options", [[], ["--reducer", "mpi"], ["--reducer", "horovod"], ["--accumulation-steps", "2"]])
def test_workers_that_share_a_gpu_compute_what_one_would(options, tmp_path):
    wanted = losses(1, tmp_path / "cpu", "--device", "cpu")
    found = losses(2, tmp_path / "gpu", "--device", "gpu", "--share-gpus", *options)
    assert found == pytest.approx(wanted, rel=1e-3)


def test_more_workers_than_gpus_are_refused(tmp_path):
    size = GPUS + 1
    result = launch(size, [ROOT / "recipes" / "cnn_torch.py", "--device", "gpu"], cwd=tmp_path)
    assert result.returncode != 0
    assert f"{size} workers on" in result.stderr and "--share-gpus" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("first", "then"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_a_run_is_resumed_on_the_other_device(first, then, tmp_path):
    wanted = losses(1, tmp_path / "whole", "--device", "cpu")
    losses(1, tmp_path / "parts", "--device", first, "--max-steps", "20")
    assert losses(1, tmp_path / "parts", "--device", then, "--resume") == pytest.approx(wanted, rel=1e-3)


def test_a_run_with_dropout_is_resumed_to_the_bit(tmp_path):
    options = ["--device", "gpu", "--deterministic", "--dropout", "0.5"]
    wanted = losses(1, tmp_path / "whole", *options)
    losses(1, tmp_path / "parts", *options, "--max-steps", "20")
    assert losses(1, tmp_path / "parts", *options, "--resume") == wanted
    cpu = losses(1, tmp_path / "cpu", "--device", "cpu", "--dropout", "0.5")
    losses(1, tmp_path / "moved", *options, "--max-steps", "20")
    moved = losses(1, tmp_path / "moved", *options, "--device", "cpu", "--resume")
    assert moved[:20] == wanted[:20] and len(moved) == 40 and moved[20:] != cpu[20:]  # other masks, and it goes on


def test_batches_that_a_thread_prepares_and_copies_are_those_of_the_cpu(tmp_path):
    """Augmentation takes longer than what the loop's own thread does."""
    options = ["--shift", "2", "--global-batch-size", "256", "--epochs", "8"]
    wanted = losses(1, tmp_path / "cpu", "--device", "cpu", *options)
    assert losses(1, tmp_path / "gpu", "--device", "gpu", *options) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", ["mixed_precision", "compiled_before_and_after"])
def test_case_alone_and_on_a_shared_gpu(case, size):
    result = launch(size, [ROOT / "tests" / "gpu" / "torch_on_device.py", case], environment=EXACT)
    assert f"passed {case}\n" in result.stdout, result.stderr[-3000:]


def test_buckets_travel_through_nccl():
    script = ROOT / "tests" / "gpu" / "torch_on_device.py"
    result = launch(1, [script, "buckets_of_one_worker"], environment=EXACT)
    assert "passed buckets_of_one_worker\n" in result.stdout, result.stderr[-3000:]


@functools.cache
def cases(size, *command):
    """What a worker prints that runs all of its cases on the GPU; each is launched once."""
    launcher = "none" if size == 1 else "mpirun"
    result = launch(size, command, launcher=launcher, environment={"HVDKIT_TEST_DEVICE": "gpu", **EXACT})
    return result.stdout, f"exit code {result.returncode}\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}"


@pytest.mark.timeout(320)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_case(size, case):
    if size == 1 and case == "control_without_distribute_ranks_part":
        return
    printed, told = cases(size, WORKERS / "torch_cases.py")
    assert f"passed {case}\n" in printed, told


@pytest.mark.timeout(320)
@pytest.mark.parametrize(
    ("worker", "case"), [("torch_cases.py", case) for case in CASES] + [("overlap_torch.py", case) for case in OVERLAP]
)
@pytest.mark.parametrize("options", IN_BUCKETS)
def test_case_in_buckets(options, worker, case):
    printed, told = cases(2, WORKERS / "as_on_gpus.py", *options, WORKERS / worker)
    assert f"passed {case}\n" in printed, told


@NEEDS_TWO
def test_workers_with_gpus_of_their_own_compute_what_one_would(tmp_path):
    wanted = losses(1, tmp_path / "cpu", "--device", "cpu")
    assert losses(2, tmp_path / "gpu", "--device", "gpu") == pytest.approx(wanted, rel=1e-3)

"""The synthetic-data recipes with their real models on a GPU, and what a run's rows say of it.

Needs one GPU, and for each framework its build for CUDA.
"""

import functools
import json
import shutil
import subprocess
import sys

import pytest

from tests.launching import ROOT, clean_environment, launch

LIST = ["nvidia-smi", "--list-gpus"]
FOUND = subprocess.run(LIST, capture_output=True, text=True).stdout if shutil.which(LIST[0]) else ""
pytestmark = [
    pytest.mark.skipif("GPU " not in FOUND, reason="this machine has no GPU"),
    pytest.mark.timeout(400),
]
SEES = {
    "torch": "import horovod.torch, torch; print(torch.cuda.device_count())",
    "tensorflow": "import horovod.tensorflow, tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))",
}
FLAVOURS = {
    "torch": "torch",
    "tensorflow": "tensorflow",
    "keras on torch": "torch",
    "keras on tensorflow": "tensorflow",
}


@functools.cache
def sees(framework):
    found = subprocess.run(
        [sys.executable, "-c", SEES[framework]], capture_output=True, text=True, env=clean_environment()
    )
    return found.returncode == 0 and int(found.stdout.split()[-1]) > 0


def results(flavour, size, tmp_path, *options):
    backend = FLAVOURS[flavour]
    if not sees(backend):
        pytest.skip(f"{backend} sees no GPU here")
    file = tmp_path / "results.json"
    steps = ["--num-warmup-batches", "5", "--num-batches-per-iter", "5", "--num-iters", "3"]
    command = [f"recipes/synthetic_{flavour.split()[0]}.py", "--device", "gpu", "--json", file, *steps, *options]
    launcher = "none" if size == 1 else "mpirun"
    result = launch(size, command, launcher=launcher, environment={"KERAS_BACKEND": backend}, timeout=380)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["resnet50", "transformer"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_real_models_train(flavour, model, precision, tmp_path):
    found = results(flavour, 1, tmp_path, "--model", model, "--precision", precision)
    assert found["size"] == "full" and found["device"] != "cpu"
    assert found["losses"][1] < found["losses"][0]
    assert found["gpu_memory_megabytes"] > 4 * 25.6, "the weights alone, in 10⁶ bytes"


@pytest.mark.parametrize("model", ["resnet50", "transformer"])
@pytest.mark.parametrize("flavour", ["torch", "tensorflow"])
def test_compiled(flavour, model, tmp_path):
    found = results(flavour, 1, tmp_path, "--model", model, "--precision", "bf16", "--compile")
    assert found["losses"][1] < found["losses"][0]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_two_workers_share_a_gpu(flavour, tmp_path):
    found = results(flavour, 2, tmp_path, "--share-gpus", "--batch-size", "8")
    assert found["workers"] == 2 and found["losses"][1] < found["losses"][0]


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_a_runs_rows_say_how_busy_the_gpu_was(framework, tmp_path):
    if not sees(framework):
        pytest.skip(f"{framework} sees no GPU here")
    command = [ROOT / "recipes" / f"cnn_{framework}.py", "--epochs", "2", "--output", tmp_path / "run"]
    result = launch(1, [*command, "--device", "gpu"], launcher="none")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    for row in (row for row in rows if row["kind"] == "epoch"):
        assert row["gpu_memory_megabytes"] > 0 and 0 <= row["gpu_utilization_percent"] <= 100

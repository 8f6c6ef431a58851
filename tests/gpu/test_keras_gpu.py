"""The keras adapter on a GPU, on both backends: alone, and two workers that share it, through the host's memory.

Needs one GPU, and for each backend its framework's build for CUDA, with Keras.
"""

import functools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.launching import ROOT, WORKERS, clean_environment, launch

CASES = re.findall(r"@case\ndef (\w+)", (WORKERS / "keras_cases.py").read_text())
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}  # float32 is float32, in matrix products and convolutions too
SEES = {
    "torch": "import torch; print(torch.cuda.device_count())",
    "tensorflow": "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))",
}


@functools.cache
def why_not(backend):
    """Why Keras on this backend can't be run on a GPU here; "" where it can."""
    script = f"import keras, horovod.{backend}\n{SEES[backend]}"
    environment = {**clean_environment(), "KERAS_BACKEND": backend}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    if found.returncode:
        return f"no Keras on {backend} here: {found.stderr.strip().splitlines()[-1]}"
    return "" if int(found.stdout.split()[-1]) else f"{backend} sees no GPU here"


@pytest.fixture(params=["torch", "tensorflow"])
def backend(request):
    if reason := why_not(request.param):
        pytest.skip(reason)
    return request.param


@functools.cache
def cases(backend, size):
    environment = {"KERAS_BACKEND": backend, "HVDKIT_TEST_DEVICE": "gpu", **EXACT}
    launcher = "none" if size == 1 else "mpirun"
    result = launch(size, [WORKERS / "keras_cases.py", *CASES], launcher=launcher, environment=environment)
    return result.stdout, f"exit code {result.returncode}\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_case(backend, size, case):
    printed, told = cases(backend, size)
    assert f"passed {case}\n" in printed, told


def recipe(backend, device, output, *options, size=1, name="cnn"):
    """The rows of a run's metrics, and what it said."""
    command = [ROOT / "recipes" / f"{name}_keras.py", "--device", device, "--output", output, *options]
    launcher = "none" if size == 1 else "mpirun"
    result = launch(size, command, launcher=launcher, environment={"KERAS_BACKEND": backend, **EXACT})
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], result.stderr


def losses(rows):
    return [row["loss"] for row in rows if row["kind"] == "step"]


def test_a_run_on_the_gpu_is_that_on_the_cpu(backend, tmp_path):
    """To rounding: the first 45 steps' losses to 1e-3 of themselves."""
    rows = {device: recipe(backend, device, tmp_path / device, "--epochs", 1)[0] for device in ("cpu", "gpu")}
    assert len(losses(rows["gpu"])) == 45
    np.testing.assert_allclose(losses(rows["gpu"]), losses(rows["cpu"]), rtol=1e-3)


def test_workers_that_share_the_gpu_train_as_one_does(backend, tmp_path):
    options = ["--epochs", 1, "--global-batch-size", 32]
    alone, _ = recipe(backend, "gpu", tmp_path / "alone", *options)
    shared, told = recipe(backend, "gpu", tmp_path / "shared", *options, "--share-gpus", size=2)
    assert told.count("gradients go through the host's memory: workers share a GPU") == 1, told
    np.testing.assert_allclose(losses(shared), losses(alone), rtol=1e-3)
    command = [ROOT / "recipes" / "cnn_keras.py", "--device", "gpu", "--output", tmp_path / "refused"]
    result = launch(2, command, environment={"KERAS_BACKEND": backend})
    assert result.returncode == 2 and "--share-gpus" in result.stderr, result.stderr[-3000:]


def test_a_deterministic_run_goes_on_to_the_bit(backend, tmp_path):
    options = ["--epochs", 2, "--deterministic", "--dropout", 0.2]
    straight, _ = recipe(backend, "gpu", tmp_path / "straight", *options)
    recipe(backend, "gpu", tmp_path / "stopped", *options, "--max-steps", 50)
    resumed, _ = recipe(backend, "gpu", tmp_path / "stopped", *options, "--resume")
    assert losses(resumed) == losses(straight)


def test_a_run_goes_on_on_the_other_device(backend, tmp_path):
    found = []
    for first, then in (("cpu", "gpu"), ("gpu", "cpu")):
        recipe(backend, first, tmp_path / first, "--epochs", 2, "--max-steps", 50)
        found.append(losses(recipe(backend, then, tmp_path / first, "--epochs", 2, "--resume")[0]))
    assert len(found[0]) == 90
    np.testing.assert_allclose(*found, rtol=2e-2)


SCRIPT = """
import sys

import keras
import toolkit.adapters.keras as dp

world = dp.start(device=sys.argv[1])
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(256), keras.layers.Dense(1)])
model.compile(dp.distribute(keras.optimizers.Adam(0.1), model), loss="mse")
model.fit(keras.ops.ones((8, 4)), keras.ops.ones((8, 1)), verbose=0)
places = {str(v.value.device) for v in [*model.variables, *model.optimizer.variables]}
print(world.device, sorted(places), dp.usage(), model.jit_compile)
dp.stop()
"""


def test_everything_is_on_the_device_that_is_asked_for(backend, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {"KERAS_BACKEND": backend}
    for device in ("auto", "gpu", "cpu"):
        result = launch(1, [tmp_path / "script.py", device], launcher="none", environment=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        named = {"torch": "cuda:0", "tensorflow": "GPU:0"}[backend] if device != "cpu" else "cpu"
        assert result.stdout.startswith(f"{named} ") and result.stdout.endswith("False\n"), result.stdout
        assert ("gpu_memory_megabytes" in result.stdout) == (device != "cpu")
        if backend == "torch":
            assert result.stdout.startswith(f"{named} ['{named}'] "), result.stdout

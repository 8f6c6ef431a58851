"""The tensorflow adapter on a GPU: alone, and two workers that share it, through the host's memory.

Needs one GPU and TensorFlow's build for CUDA.
"""

import functools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.launching import ROOT, WORKERS, clean_environment, launch

CASES = re.findall(r"@case\ndef (\w+)", (WORKERS / "tensorflow_cases.py").read_text())
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}  # float32 is float32, in matrix products and convolutions too


@pytest.fixture(scope="module", autouse=True)
def needs_a_gpu():
    script = "import horovod.tensorflow, tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean_environment())
    if found.returncode:
        pytest.skip(f"no TensorFlow here: {found.stderr.strip().splitlines()[-1]}")
    if not int(found.stdout.split()[-1]):
        pytest.skip("TensorFlow sees no GPU here")


@functools.cache
def cases(size):
    environment = {"HVDKIT_TEST_DEVICE": "gpu", **EXACT}
    launcher = "none" if size == 1 else "mpirun"
    result = launch(size, [WORKERS / "tensorflow_cases.py"], launcher=launcher, environment=environment)
    return result.stdout, f"exit code {result.returncode}\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_case(size, case):
    printed, told = cases(size)
    assert f"passed {case}\n" in printed, told


def losses(device, output, *options, size=1):
    command = [ROOT / "recipes/cnn_tensorflow.py", "--epochs", 1, "--device", device, "--output", output, *options]
    result = launch(size, command, launcher="none" if size == 1 else "mpirun", environment=EXACT)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "step"]


def test_runs_on_the_gpu_alone_and_shared_are_that_on_the_cpu(tmp_path):
    expected = losses("cpu", tmp_path / "cpu")
    assert len(expected) == 45
    np.testing.assert_allclose(losses("gpu", tmp_path / "gpu"), expected, rtol=1e-3)
    np.testing.assert_allclose(losses("gpu", tmp_path / "two", "--share-gpus", size=2), expected, rtol=1e-3)


def test_a_deterministic_run_is_the_same_to_the_bit(tmp_path):
    one, other = (losses("gpu", tmp_path / name, "--deterministic") for name in ("one", "other"))
    assert one == other

"""BatchNorm over the samples of all ranks on a GPU that two workers share, through the host's memory.

Needs one GPU, and for each framework its build for CUDA.
"""

import functools
import subprocess
import sys

import pytest

from tests.launching import clean_environment, launch
from tests.parallel.test_batch_norm import CASES, KERAS, KERAS_CASES, TORCH

SEES = {
    "torch": "import horovod.torch, torch; print(torch.cuda.device_count())",
    "tensorflow": "import horovod.tensorflow, tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))",
}


@functools.cache
def why_not(framework):
    """Why this framework can't be run on a GPU here; "" where it can."""
    command = [sys.executable, "-c", SEES[framework]]
    found = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    if found.returncode:
        return f"no {framework} here: {found.stderr.strip().splitlines()[-1]}"
    return "" if int(found.stdout.split()[-1]) else f"{framework} sees no GPU here"


@functools.cache
def run(backend, worker, *arguments):
    if reason := why_not(backend):
        pytest.skip(reason)
    environment = {"HVDKIT_TEST_DEVICE": "gpu", "KERAS_BACKEND": backend, "NVIDIA_TF32_OVERRIDE": "0"}
    result = launch(2, [worker, *arguments], environment=environment)
    return result.stdout, f"exit code {result.returncode}\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}"


@pytest.mark.parametrize("case", CASES)
def test_torch(case):
    printed, told = run("torch", TORCH)
    assert f"passed {case}\n" in printed, told


@pytest.mark.parametrize("case", KERAS_CASES)
@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_keras(backend, case):
    printed, told = run(backend, KERAS, "keras")
    assert f"passed {case}\n" in printed, told

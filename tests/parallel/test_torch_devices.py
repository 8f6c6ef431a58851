"""torch and GPUs that it counts but can't use, as with a driver older than its CUDA; they are played."""

import pytest

from tests.launching import launch

SCRIPT = """
import importlib, sys
import torch

adapter, works, device = sys.argv[1:]
dp = importlib.import_module(f"toolkit.adapters.{adapter}")

def fail(number):
    raise RuntimeError("CUDA error: unknown error\\nCompile with TORCH_USE_CUDA_DSA")

torch.cuda.device_count = lambda: 1  # NVML's
torch.cuda.is_available = lambda: works == "works"
torch.cuda.set_device = fail
print("on", dp.start(device=device).device)
dp.stop()
"""
ADAPTERS = ["torch", pytest.param("keras", marks=pytest.mark.long)]


def start(*arguments, **environment):
    environment |= {"KERAS_BACKEND": "torch"}
    return launch(1, ["-c", SCRIPT, *arguments], launcher="none", environment=environment, timeout=120)


ELASTIC = """
from toolkit import elastic, world
from toolkit.adapters import _job

class Played:
    gpus = 0
    size, nccl_built = staticmethod(lambda: 1), staticmethod(lambda: True)
    visible_gpus, use_cpu = staticmethod(lambda: Played.gpus), staticmethod(lambda: None)

elastic.is_active = lambda: True
for Played.gpus in (0, 2):
    print(_job.choose_device(Played, world.World(), "auto", False, Played).device)
"""


def test_a_process_of_an_elastic_job_stays_on_the_cpu_that_it_took():
    assert launch(1, ["-c", ELASTIC], launcher="none").stdout == "cpu\ncpu\n"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_gpu_that_torch_only_counts_is_left_alone_or_refused(adapter):
    assert start(adapter, "fails", "auto").stdout == "on cpu\n"
    refused = start(adapter, "fails", "gpu")
    assert refused.returncode == 2 and "sees no GPU: look at `hvdkit doctor`" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_gpu_that_cannot_be_begun_ends_the_job_with_a_line(adapter):
    result = start(adapter, "works", "gpu")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert (
        "torch can't use cuda:0 (CUDA error: unknown error): look at `hvdkit doctor`" in result.stderr.splitlines()[-1]
    )


def test_the_environment_decides_for_workers_that_may_choose():
    assert start("torch", "works", "auto", HVDKIT_DEVICE="cpu").stdout == "on cpu\n"
    assert start("torch", "works", "gpu", HVDKIT_DEVICE="cpu").returncode == 2
    refused = start("torch", "works", "auto", HVDKIT_DEVICE="tpu")
    assert refused.returncode == 2 and "'tpu'" in refused.stderr.splitlines()[-1]

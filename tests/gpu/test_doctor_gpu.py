"""`hvdkit doctor` and `hvdkit env` on a machine with a GPU, whose Horovod has NCCL."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.launching import ROOT, clean_environment
from toolkit.doctor import gpus, probe

FACTS = probe.facts(os.getcwd())
SEEN = gpus.read(FACTS)
pytestmark = [
    pytest.mark.skipif(SEEN is None or not SEEN.names, reason="this machine has no GPU that can be used"),
    pytest.mark.skipif("torch" not in FACTS["gpu_build"], reason="Horovod was built without NCCL for torch"),
    pytest.mark.timeout(200),
]


def hvdkit(*words, **variables):
    environment = {**clean_environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "-m", "toolkit.cli", *words]
    told = subprocess.run(line, env={**environment, **variables}, capture_output=True, text=True, timeout=180)
    return told.returncode, told.stdout


def checks(*words, **variables):
    code, out = hvdkit("doctor", "--json", "--framework", "torch", *words, **variables)
    return code, {check["name"]: check for check in json.loads(out)["checks"]}


def test_this_machine_is_well():
    _, found = checks()
    for name in ("GPU driver", "GPUs", "NCCL network", "torch on GPUs", "NCCL for torch", "torch all-reduce, GPUs"):
        assert found[name]["ok"], found[name]
    count = len(SEEN.names)
    assert re.match(rf"right on {count} ranks? \(GPU, by NCCL\); 256 MiB in", found["torch all-reduce, GPUs"]["found"])
    assert re.match(r"\d+\.\d+.*, which serves CUDA 1\d\.\d", found["GPU driver"]["found"])


def test_faults_of_a_real_driver():
    code, found = checks(CUDA_VISIBLE_DEVICES="99")
    assert code == 1 and "CUDA_VISIBLE_DEVICES is '99'" in found["GPUs"]["found"]
    assert "torch all-reduce, GPUs" not in found


def test_env_names_driver_and_gpus():
    code, out = hvdkit("env", "--json")
    told = json.loads(out)
    assert code == 0 and told["GPUs"] == SEEN.described() and told["NCCL"] and "torch" in told["horovod with NCCL for"]

"""What a run's rows say of its GPUs, which stubs of the driver and NVML play; torch computes on the CPU."""

import json

import pytest

from tests.launching import WORKERS, launch
from tests.single import gpu_host

NAMES = ("gpu_memory_megabytes", "gpu_utilization_percent")


def told(size, libraries, folder, *options):
    """The numbers about GPUs in each epoch's row."""
    folder.mkdir()
    gpu_host.build(folder, {name: gpu_host.LIBRARIES[name] for name in libraries})
    command = [WORKERS / "gpu_usage_worker.py", "--epochs", "2", "--global-batch-size", "4", *options]
    result = launch(
        size,
        [*command, "--output", folder / "run"],
        launcher="none" if size == 1 else "mpirun",
        environment={"LD_LIBRARY_PATH": str(folder)},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [{name: row[name] for name in NAMES if name in row} for row in rows if row["kind"] == "epoch"]


def test_an_epochs_row_has_the_largest_memory_and_the_mean_of_what_nvml_tells(tmp_path):
    found = told(2, ["libcuda.so.1", "libnvidia-ml.so.1"], tmp_path / "both", "--device", "gpu")
    # Looks after 50, 100 and 110 steps, and one at the epoch's end, which is not in the mean: 0, 1, 2, (3), 4, 5, 6.
    assert found == [
        {"gpu_memory_megabytes": 200, "gpu_utilization_percent": (51 + 61) / 2},
        {"gpu_memory_megabytes": 200, "gpu_utilization_percent": (55 + 65) / 2},
    ]


@pytest.mark.long
def test_without_nvml_there_is_the_memory_and_on_a_cpu_nothing(tmp_path):
    assert told(1, ["libcuda.so.1"], tmp_path / "driver") == [{"gpu_memory_megabytes": 100}] * 2
    assert told(1, ["libcuda.so.1"], tmp_path / "cpu", "--device", "cpu") == [{}, {}]

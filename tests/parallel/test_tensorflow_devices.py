"""TensorFlow and GPUs, as far as it goes without one: who sees which, what is where, and the way that gradients take.

What GPUs there are is played to TensorFlow, whose build for CPUs goes by it up to the CUDA driver.
"""

import json
import re

import pytest

from tests.launching import WORKERS, launch

REDUCERS = ["missing_gradients_count_as_zero_or_stay", "a_flag_is_heard_by_all"]
REDUCERS += ["a_step_with_a_nan_is_left_out_on_all_ranks", "sparse_embeddings_beside_dense_weights"]
LOOPS = re.findall(r"@case\ndef (\w+)", (WORKERS / "tensorflow_cases.py").read_text())


def played(size, *arguments, launcher="mpirun"):
    """Each rank's device, the GPUs that TensorFlow would show itself, and its threads; and what was said."""
    command = [WORKERS / "played_gpus.py", *arguments]
    result = launch(size, command, launcher=launcher, environment={"HVDKIT_THREADS": "1"}, timeout=120)
    found = re.findall(r"rank \d \{'device': '(.*?)', 'shown': '(.*?)', 'grows': (\w+)\} (\d+)", result.stdout)
    return found, result


def test_each_rank_sees_its_own_gpu_alone_and_takes_what_memory_it_needs():
    found, result = played(2, "2", "--device", "gpu")
    assert [rank[:3] for rank in found] == [("GPU:0", "0", "True"), ("GPU:0", "1", "True")], result.stderr[-3000:]
    assert result.stderr.count("gradients go through the host's memory: Horovod was built without NCCL") == 1


def test_the_device_is_taken_before_anything_has_tensorflow_begin():
    """Under horovodrun --gloo the ranks talk by TensorFlow itself, which must have its threads and GPU by then."""
    found, result = played(2, "2", "nccl", launcher="horovodrun-gloo")
    assert [rank[:2] for rank in found] == [("GPU:0", "0"), ("GPU:0", "1")], result.stderr[-3000:]
    assert all(int(threads) > 0 for *_, threads in found) and "thread counts" not in result.stderr


@pytest.mark.long
def test_one_process_in_which_tensorflow_begins_early():
    found, result = played(1, "1", "--deterministic", launcher="none")
    assert [rank[1] for rank in found] == ["0"] and int(found[0][3]) > 0, result.stderr[-3000:]
    for count in ("1", "2"):  # of one TensorFlow sees what it would see anyway, and has its memory all the same
        _, result = played(1, count, "touched", launcher="none")
        assert result.returncode == 2 and "call start() first" in result.stderr.splitlines()[-1], result.stderr[-3000:]


CPUS = "training on CPUs, though there are GPUs: "


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("horovodrun-gloo", marks=pytest.mark.long)])
def test_workers_that_may_choose_leave_too_few_gpus_alone_and_say_so_once(launcher):
    found, result = played(2, "1", "nccl", launcher=launcher)
    assert [rank[:2] for rank in found] == [("cpu", "")] * 2, result.stderr[-3000:]
    assert re.findall(rf"{CPUS}2 workers on \S+ and 1 GPU\(s\): .* --share-gpus", result.stderr), result.stderr[-3000:]
    assert result.returncode == 0 and result.stderr.count(CPUS) == 1


def test_workers_that_may_choose_do_not_train_on_gpus_without_nccl():
    found, result = played(2, "2")
    assert [rank[:2] for rank in found] == [("cpu", "")] * 2, result.stderr[-3000:]
    assert result.stderr.count(f"{CPUS}Horovod was built without NCCL: `make setup GPU=1`") == 1


def test_a_gpu_that_the_launcher_shows_a_worker_is_its_own():
    found, result = played(2, "1", "handed-out", "nccl")
    assert [rank[:2] for rank in found] == [("GPU:0", "0")] * 2, result.stderr[-3000:]
    assert CPUS not in result.stderr


@pytest.mark.long
def test_more_workers_than_gpus_are_refused_or_share():
    _, result = played(2, "1", "--device", "gpu")
    assert result.returncode == 2 and "2 workers on " in result.stderr and "--share-gpus" in result.stderr
    found, result = played(2, "1", "--share-gpus")
    assert [rank[:2] for rank in found] == [("GPU:0", "0")] * 2, result.stderr[-3000:]
    assert result.stderr.count("gradients go through the host's memory: workers share a GPU") == 1


def test_a_limit_of_memory_that_the_script_has_set_stays():
    found, result = played(1, "1", "limited", launcher="none")
    assert [rank[:3] for rank in found] == [("GPU:0", "0", "False")], result.stderr[-3000:]


def test_workers_with_parts_of_a_gpu_train_without_nccl():
    found, result = played(2, "1", "parts", "nccl")
    assert [rank[:2] for rank in found] == [("GPU:0", "0")] * 2, result.stderr[-3000:]
    assert result.stderr.count("gradients go through the host's memory: workers have parts of the same GPU (MIG)") == 1


def test_cpu_hides_the_gpus():
    found, result = played(1, "2", "--device", "cpu", launcher="none")
    assert [rank[:2] for rank in found] == [("cpu", "")], result.stderr[-3000:]


def test_gradients_are_added_up_where_they_are_or_in_the_host_and_what_is_beside_them_there():
    result = launch(2, [WORKERS / "two_devices.py"], timeout=120)
    for way, where in (("nccl", ""), ("host", "CPU:0")):  # "": where the function runs
        told = re.search(rf"{way} (\{{.*\}})", result.stdout)
        assert told, result.stderr[-3000:]
        expected = {"weights": ["CPU:1"], "reduces": [where], "beside": ["CPU:0"], "heard": True, "right": True}
        assert json.loads(told[1]) == expected, way
    assert 'arrays [["CPU:0"], ["CPU:1"]]\n' in result.stdout


def passes(cases, result):
    for case in cases:
        assert re.search(rf"passed {case}$", result.stdout, re.MULTILINE), result.stdout[-3000:] + result.stderr[-3000:]


def test_gradients_in_buckets():
    command = [WORKERS / "as_on_gpus.py", WORKERS / "reducer_cases.py", "tensorflow", 1, *REDUCERS]
    passes(REDUCERS, launch(2, command, timeout=200))


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_loops_with_gradients_in_buckets(size):
    passes(LOOPS, launch(size, [WORKERS / "as_on_gpus.py", WORKERS / "tensorflow_cases.py"], timeout=280))

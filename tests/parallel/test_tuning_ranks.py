"""What tuning and the file of `hvdkit tune` make of real ranks."""

import json
import os
import re
from dataclasses import replace

import pytest

from tests.launching import ROOT, WORKERS, launch, some_long
from toolkit import step_times, tuned, tuning

CORES = sorted(os.sched_getaffinity(0))
YIELD = "OMPI_MCA_mpi_yield_when_idle"
OURS = {"HOROVOD_CYCLE_TIME": "0.2", YIELD: "1"}
TUNED = {"HOROVOD_CYCLE_TIME": "100", tuning.THREADS: "3"}


JOB = tuned.Job("torch", 2, 2, tuning.host_cores(), "cpu", "Open MPI")


def keep(place, environment, job=JOB):
    tuned.write(place / tuned.path_for("tuning_cases", job), tuned.Tuned(job, environment, {}))


def ranks(place, *arguments, environment=None, **more):
    """What each of two ranks tells, and all that was printed."""
    command = [WORKERS / "tuning_cases.py", *arguments]
    result = launch(2, command, cwd=place, environment=environment, timeout=120, **more)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(re.search(r"FOUND (.*)", result.stdout)[1]), result.stdout + result.stderr


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
def test_later_runs_take_up_what_was_found(tmp_path, launcher):
    keep(tmp_path, TUNED, JOB if launcher == "mpirun" else replace(JOB, mpi="none"))
    found, printed = ranks(tmp_path, "-v", launcher=launcher)
    own = {YIELD: "1"} if launcher == "mpirun" else {}
    for rank in found:
        assert rank["environment"] == {**own, **TUNED} and rank["threads"] == 3
        assert rank["seconds"] > 0.25, "Horovod looks at its queue each 0.1 s, so 5 operations can't take less"
    assert "HOROVOD_CYCLE_TIME=100: found by hvdkit tune, in runs/tuning_cases.tuned-torch-np2.json" in printed


@pytest.mark.skipif(len(CORES) < 2, reason="needs 2 cores")
def test_each_rank_keeps_to_its_own_cores(tmp_path):
    found, printed = ranks(tmp_path, "-v", environment={tuning.AFFINITY: "1"})
    parts = [rank["cores"] for rank in found]
    assert sorted(parts[0] + parts[1]) == CORES and all(parts)
    assert "kept to CPU(s)" in printed and "HVDKIT_AFFINITY=1" in printed


@pytest.mark.skipif(len(CORES) < 2, reason="needs 2 cores")
def test_ranks_that_the_launcher_has_bound_stay_where_they_are(tmp_path):
    bind = ("--bind-to", "core")
    found, printed = ranks(tmp_path, "-v", environment={tuning.AFFINITY: "1"}, options=bind)
    assert "cores left alone: the launcher has bound this worker to" in printed
    assert found[0]["cores"] != found[1]["cores"]
    assert all(rank["threads"] <= len(rank["cores"]) for rank in found)


LEFT_ALONE = {
    "another machine": ({}, ["-v"], "runs/tuning_cases.tuned-torch-np2.json left alone: it is for 999 core(s) a host"),
    "--no-tuning": ({}, ["-v", "--no-tuning"], "tuning: off"),
    "HVDKIT_TUNED is empty": ({tuned.VARIABLE: ""}, ["-v"], "HOROVOD_CYCLE_TIME=0.2: "),
    "the user's word": ({"HOROVOD_CYCLE_TIME": "0.3", "OMP_NUM_THREADS": "2"}, ["-v"], "=0.3 left alone: it is set"),
}


@pytest.mark.parametrize("why", some_long(LEFT_ALONE, short=["another machine", "the user's word"]))
def test_what_was_found_is_left_alone(tmp_path, why):
    environment, arguments, told = LEFT_ALONE[why]
    keep(tmp_path, TUNED, replace(JOB, cores=999) if why == "another machine" else JOB)
    found, printed = ranks(tmp_path, *arguments, environment=environment)
    assert told in printed, printed
    users = {name: environment[name] for name in environment if name in tuned.ACCEPTED}
    for rank in found:
        assert rank["environment"] == ({} if why == "--no-tuning" else {**OURS, **users})
        assert rank["threads"] != 3


SHARE = max(1, tuning.host_cores())  # of the one rank
# TensorFlow's 0 is its own choice, for which it reads its variables.
THREADS = {
    "nothing, torch": (["torch"], {}, [SHARE], "compute thread(s): "),
    "a call, torch": (["torch", "7"], {}, [7], "left alone: torch.set_num_threads(7) was called"),
    "MKL": (["torch"], {"MKL_NUM_THREADS": "1"}, [1], "left alone: MKL_NUM_THREADS=1 is set"),
    "nothing, TensorFlow": (["tensorflow"], {}, [SHARE, max(2, SHARE)], "compute thread(s): "),
    "a call, TensorFlow": (["tensorflow", "7", "5"], {}, [7, 5], "left alone: tf.config.threading has 7"),
    "variables": (
        ["tensorflow"],
        {"TF_NUM_INTRAOP_THREADS": "7", "TF_NUM_INTEROP_THREADS": "5"},
        [0, 0],
        "compute threads left alone: TF_NUM_INTRAOP_THREADS=7 is set",
    ),
    "between operations": (
        ["tensorflow"],
        {"TF_NUM_INTEROP_THREADS": "5"},
        [SHARE, 0],
        "threads for independent operations left alone: TF_NUM_INTEROP_THREADS=5 is set",
    ),
    "ours comes first": (
        ["tensorflow", "7", "5"],
        {tuning.THREADS: "3"},
        [3, 5],
        "3 compute thread(s): HVDKIT_THREADS",
    ),
}


@pytest.mark.parametrize("how", some_long(THREADS, short=["a call, torch", "variables", "between operations"]))
def test_threads_that_the_user_set_are_left_alone(how):
    arguments, environment, threads, told = THREADS[how]
    result = launch(1, [WORKERS / "threads_cases.py", *arguments], launcher="none", environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"FOUND {' '.join(map(str, threads))}\n" in result.stdout and told in result.stdout, result.stdout


def test_a_bad_file_is_a_line_and_where_it_was_named_the_end(tmp_path):
    path = tmp_path / tuned.path_for("tuning_cases", JOB)
    path.parent.mkdir()
    path.write_text('{"format": 1')
    found, printed = ranks(tmp_path)
    assert [rank["environment"] for rank in found] == [OURS, OURS]
    assert printed.count("is no file of hvdkit tune, as it is no JSON: remove it") == 1
    named = {tuned.VARIABLE: str(path)}
    result = launch(2, [WORKERS / "tuning_cases.py"], cwd=tmp_path, environment=named, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "is no file of hvdkit tune, as it is no JSON" in result.stderr


@pytest.mark.parametrize("who", ["the file", "the user"])
def test_a_reducer_is_a_wish_of_the_file_and_a_demand_of_the_user(tmp_path, who):
    """Without MPI, as where mpi4py has gone since it was found."""
    path, by_mpi = tmp_path / "tuned.json", {tuned.REDUCER: "mpi"}
    tuned.write(path, tuned.Tuned(replace(JOB, mpi="none"), by_mpi, {}))
    command = [ROOT / "recipes/linear_regression_torch.py", "-v", "--max-steps", "2", "--output", tmp_path / "run"]
    environment = by_mpi if who == "the user" else {tuned.VARIABLE: str(path)}
    result = launch(2, command, launcher="horovodrun-gloo", environment=environment, timeout=200)
    assert (result.returncode == 0) == (who == "the file"), result.stdout + result.stderr
    if who == "the file":
        assert "HVDKIT_REDUCER=mpi: found by hvdkit tune" in result.stdout and "a step, by horovod" in result.stdout
    else:
        assert 'reducer="mpi" needs workers that were started by MPI' in result.stderr


@pytest.mark.parametrize("framework", some_long(["torch", "tensorflow", "keras"], short=["torch"]))
def test_the_times_of_a_runs_steps(tmp_path, framework):
    path = tmp_path / "times.json"
    command = [ROOT / f"recipes/linear_regression_{framework}.py", "--output", tmp_path / "run", "--max-steps", "9"]
    command += ["--global-batch-size", "100"]  # 5 steps an epoch
    result = launch(2, command, environment={step_times.VARIABLE: str(path)}, timeout=200)
    assert result.returncode == 0, result.stderr
    found = json.loads(path.read_text())
    assert len(found["seconds"]) == 9 and min(found["seconds"]) > 0
    assert (found["name"], found["workers"], found["local_workers"]) == (f"linear_regression_{framework}", 2, 2)
    assert found["framework"] == ("torch" if framework == "torch" else "tensorflow")
    assert found["cores"] == tuning.host_cores() and (found["device"], found["mpi"]) == ("cpu", "Open MPI")
    assert found["options"] == "--global-batch-size 100"

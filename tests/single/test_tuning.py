"""What tuning chooses in many situations, and the file of `hvdkit tune`: what of it is taken up, what is refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from toolkit import tune, tuned, tuning
from toolkit.errors import UsageError
from toolkit.tuning import AFFINITY, THREADS, Choices
from toolkit.world import World

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
YIELD = "OMPI_MCA_mpi_yield_when_idle"


@pytest.mark.parametrize(
    ("environ", "mpi", "chosen"),
    [
        (OPEN_MPI, "Open MPI", {YIELD: "1", "HOROVOD_CYCLE_TIME": "0.2"}),
        (MPICH, "MPICH", {"HOROVOD_CYCLE_TIME": "0.2"}),
        ({"HOROVOD_CONTROLLER": "gloo", "HOROVOD_RANK": "0"}, "none", {"HOROVOD_CYCLE_TIME": "0.2"}),
        ({"SLURM_PROCID": "0"}, "", {YIELD: "1", "HOROVOD_CYCLE_TIME": "0.2"}),
        ({**OPEN_MPI, YIELD: "0"}, "Open MPI", {"HOROVOD_CYCLE_TIME": "0.2"}),
        ({**OPEN_MPI, YIELD: "0", "HOROVOD_CYCLE_TIME": ""}, "Open MPI", {}),
    ],
)
def test_variables_follow_from_the_mpi_and_from_what_is_set(environ, mpi, chosen):
    assert tuning.mpi_of(environ) == mpi
    found = tuning.choose_environment(environ)
    assert dict(found.environment) == chosen
    assert all(f"{name}={value}: " in found.explain() for name, value in chosen.items())
    assert YIELD not in environ or f"{YIELD}={environ[YIELD]} left alone: it is set" in found.explain()


@pytest.mark.parametrize(
    ("own", "around", "local_size", "threads"),
    [
        (1, 1, 1, 1),
        (1, 1, 4, 1),
        (2, 2, 1, 2),
        (2, 2, 2, 1),
        (2, 2, 3, 1),
        (64, 64, 1, 64),
        (64, 64, 8, 8),
        (64, 64, 96, 1),
        (1, 64, 8, 1),  # bound to a core
        (8, 64, 8, 8),  # bound to a part of one's own
        (32, 64, 2, 32),  # to a socket of one's own
        (32, 64, 8, 8),  # to a socket, with three others
        (4, 3, 1, 4),  # a launcher that has less was not the one who bound it
    ],
)
def test_threads_follow_from_cores_workers_and_binding(own, around, local_size, threads):
    found = tuning.with_threads(Choices(), local_size, {}, own, around)
    assert found.threads == threads
    assert ("bound" in found.explain()) == (own < around)


@pytest.mark.parametrize(
    ("environ", "threads", "told"),
    [
        ({THREADS: "3"}, 3, "3 compute thread(s): HVDKIT_THREADS"),
        ({"OMP_NUM_THREADS": "5"}, None, "OMP_NUM_THREADS=5 is set"),
        ({THREADS: "3", "OMP_NUM_THREADS": "5"}, 3, "3 compute thread(s): HVDKIT_THREADS"),
    ],
)
def test_threads_that_are_asked_for(environ, threads, told):
    found = tuning.with_threads(Choices(), 2, environ, 8, 8)
    assert found.threads == threads and told in found.explain()


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "1.5", "99999", "1\n", "٣"])
def test_what_is_no_number_of_threads_is_one_line(text):
    with pytest.raises(UsageError, match="HVDKIT_THREADS is .*: expected a number of threads") as error:
        tuning.with_threads(Choices(), 2, {THREADS: text}, 8, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cores", "local_size", "blocks"),
    [
        ([0, 1], 2, [(0,), (1,)]),
        ([0], 1, [(0,)]),
        ([4, 5, 6, 7, 8], 2, [(4, 5), (6, 7, 8)]),
        (range(64), 8, [tuple(range(8 * r, 8 * r + 8)) for r in range(8)]),
        ([0, 1], 3, [None, None, None]),
    ],
)
def test_each_worker_has_a_part_of_the_cores_to_itself(cores, local_size, blocks):
    on = {AFFINITY: "1"}
    found = [tuning.with_affinity(Choices(), r, local_size, on, cores, bound=False) for r in range(local_size)]
    assert [choices.cores for choices in found] == blocks
    assert all(choices.reasons for choices in found)
    for environ in ({}, {AFFINITY: "0"}):
        assert tuning.with_affinity(Choices(), 0, local_size, environ, cores, bound=False) == Choices()


@pytest.fixture
def two_threads_a_core(tmp_path):
    """Eight logical CPUs as the kernel usually numbers them: CPU c and c + 4 are core c's."""
    for cpu in range(8):
        place = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("cpus", "cores"),
    [
        (range(8), [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ([1, 2, 5], [(1, 5), (2,)]),
        ([0, 8, 9], [(0,), (8,), (9,)]),  # of which the kernel does not tell
    ],
)
def test_hardware_threads_of_one_core_are_one_core(two_threads_a_core, cpus, cores, monkeypatch):
    assert tuning.physical_cores(cpus, two_threads_a_core) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(cpus))
    assert tuning.usable_cores(two_threads_a_core) == tuning.host_cores(two_threads_a_core) == len(cores)


@pytest.mark.parametrize(
    ("local_size", "parts"),
    [
        (1, [tuple(range(8))]),
        (2, [(0, 1, 4, 5), (2, 3, 6, 7)]),
        (4, [(0, 4), (1, 5), (2, 6), (3, 7)]),
        (8, [(0,), (4,), (1,), (5,), (2,), (6,), (3,), (7,)]),
    ],
)
def test_workers_do_not_share_a_core_where_there_is_one_for_each(two_threads_a_core, local_size, parts):
    given = {"environ": {AFFINITY: "1"}, "cores": range(8), "bound": False, "root": two_threads_a_core}
    assert [tuning.with_affinity(Choices(), r, local_size, **given).cores for r in range(local_size)] == parts


def test_a_worker_that_its_launcher_has_bound_stays_there():
    found = tuning.with_affinity(Choices(), 1, 2, {AFFINITY: "1"}, [2, 3], bound=True)
    assert found.cores is None and "the launcher has bound this worker to 2,3" in found.explain()
    with pytest.raises(UsageError, match="HVDKIT_AFFINITY is 'yes': expected 1"):
        tuning.with_affinity(Choices(), 0, 1, {AFFINITY: "yes"}, [0], bound=False)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core can't be bound to fewer")
@pytest.mark.parametrize("bound", [False, True])
def test_whether_the_launcher_has_bound_this_process_is_seen(bound):
    def bind():
        if bound:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    code = "from toolkit import tuning as t; print(t.is_bound(), t.usable_cores(), t.host_cores())"
    line = [sys.executable, "-c", code]
    out = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True, preexec_fn=bind).stdout
    assert out.split() == [str(bound), "1" if bound else str(tuning.usable_cores()), str(tuning.usable_cores())]


def test_what_was_found_comes_after_the_users_word_and_before_our_own():
    found = {"HOROVOD_CYCLE_TIME": "5", YIELD: "0", THREADS: "3", AFFINITY: "1"}
    environ = {**OPEN_MPI, YIELD: "1", "OMP_NUM_THREADS": "7"}
    chosen = tuning.choose_environment(environ, found, "a file")
    assert dict(chosen.environment) == {"HOROVOD_CYCLE_TIME": "5", AFFINITY: "1"}
    assert "HOROVOD_CYCLE_TIME=5: found by hvdkit tune, in a file" in chosen.explain()
    assert "OMP_NUM_THREADS=7 is set" in tuning.with_threads(chosen, 2, environ, 8).explain()
    assert THREADS in tuning.choose_environment(OPEN_MPI, found, "a file").environment
    assert THREADS not in tuning.choose_environment(OPEN_MPI, found, "a file", "a call was made").environment
    left = tuning.with_threads(chosen, 2, {}, 8, users_threads="a call was made")
    assert left.threads is None and "left alone: a call was made" in left.explain()


HERE = tuned.Job("torch", 2, 2, 2, "cpu", "Open MPI", "--model resnet50")
GOOD = tuned.Tuned(HERE, {"HOROVOD_CYCLE_TIME": "0.5", tuned.REDUCER: "mpi"}, {"command": "python x.py"})


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tuned.path_for("x", HERE)


def take_up(script="x", job=HERE, environ=None, rank=0):
    return tuned.take_up(
        script, job, World(rank, job.workers, rank % job.local_workers, job.local_workers), environ or {}
    )


def test_a_file_is_read_as_it_was_written(place):
    tuned.write(place, GOOD)
    assert tuned.read(place) == GOOD
    assert take_up(rank=1) == (place, GOOD.environment, "")


NOT_FOUND = {
    "another script": ("y", {}, {}),
    "none is wanted": ("x", {}, {tuned.VARIABLE: ""}),
    "another number of workers": ("x", {"workers": 1, "local_workers": 1}, {}),
    "another framework or backend": ("x", {"framework": "tensorflow"}, {}),
    "another model": ("x", {"options": "--model transformer"}, {}),
    "two hosts, which may have different files": ("x", {"local_workers": 1}, {}),
}


@pytest.mark.parametrize("why", NOT_FOUND)
def test_a_file_of_another_job_is_not_found(place, why):
    script, changes, environ = NOT_FOUND[why]
    tuned.write(place, GOOD)
    assert take_up(script, replace(HERE, **changes), environ) == (None, {}, "")


@pytest.mark.parametrize(
    ("changes", "why_not"),
    [
        ({"cores": 64}, "2 core(s) a host, and this job has 64"),
        ({"mpi": "none"}, "MPI 'Open MPI', and this job has 'none'"),
        ({"device": "gpu"}, "device 'cpu', and this job has 'gpu'"),
        ({"framework": "tensorflow"}, "framework 'torch', and this job has 'tensorflow'"),
        ({"options": ""}, "options '--model resnet50', and this job has ''"),
        ({"workers": 3, "local_workers": 3}, "2 worker(s), and this job has 3"),
    ],
)
def test_a_file_for_another_job_is_left_alone(place, changes, why_not):
    tuned.write(place, GOOD)
    found = take_up(job=replace(HERE, **changes), environ={tuned.VARIABLE: str(place)})
    assert found == (place, {}, f"{place} left alone: it is for {why_not}")
    if changes.keys() & {"cores", "mpi", "device"}:  # of which there are no files beside each other
        assert take_up(job=replace(HERE, **changes)) == found


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("", ""),
        ("--epochs 3 --seed=4 -v --resume --output runs/x --learning-rate -1", ""),
        ("--size full --model=resnet50 --epochs=3", "--model resnet50 --size full"),
        ("--model resnet50 -v --compile --size full", "--compile --model resnet50 --size full"),
        ("data.csv --max-steps 10 --check-sync 0 --checkpoint-every 10", "data.csv"),
    ],
)
def test_options_of_no_matter_to_the_speed_do_not_tell_jobs_apart(arguments, options):
    assert tuned.options_of(arguments.split()) == options


def test_on_several_hosts_a_named_file_must_fit_on_each(place):
    job = replace(HERE, workers=4)
    tuned.write(place, tuned.Tuned(job, GOOD.environment, {}))
    environ = {tuned.VARIABLE: str(place)}
    assert take_up(job=job, environ=environ, rank=3)[1] == GOOD.environment
    with pytest.raises(UsageError, match=r"is for 2 core\(s\) a host, and this job has 8: "):
        take_up(job=replace(job, cores=8), environ=environ, rank=3)  # of this host; the others have taken it up


def changed(**changes):
    content = {"format": 2, "job": asdict(HERE), "environment": {}}
    return json.dumps({**content, **changes}).encode()


BAD = {
    b"": "it is no JSON",
    b"\xff\x00": "it is no JSON",
    b"[" * 50_000: "it is no JSON",
    b'{"format": 2}' + b" " * 70_000: "its job is None",
    b"[]": 'it has no "format": 2',
    changed(format=1): 'it has no "format": 2',
    changed(job={"workers": 2}): "its job is",
    changed(job={**asdict(HERE), "workers": 0}): "its workers is 0",
    changed(job={**asdict(HERE), "local_workers": True}): "its local_workers is True",
    changed(job={**asdict(HERE), "device": ["gpu"]}): "its device is ['gpu']",
    changed(environment=["HOROVOD_CYCLE_TIME"]): "its environment is",
    changed(environment={"LD_PRELOAD": "/x.so"}): "it sets 'LD_PRELOAD', which hvdkit tune does not",
    changed(environment={"HOROVOD_CYCLE_TIME": 1}): "it sets HOROVOD_CYCLE_TIME to 1",
    changed(environment={"HOROVOD_CYCLE_TIME": "fast\n"}): r"it sets HOROVOD_CYCLE_TIME to 'fast\n'",
    changed(environment={"HVDKIT_REDUCER": "x" * 500}): "it sets HVDKIT_REDUCER to 'xxx",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_a_bad_file_is_one_line(place, capsys, content):
    place.parent.mkdir()
    place.write_bytes(content)
    with pytest.raises(UsageError) as error:
        take_up(environ={tuned.VARIABLE: str(place)})
    assert BAD[content] in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300
    assert take_up(rank=1)[1:] == ({}, f"{place} left alone: it can't be used")
    assert capsys.readouterr().err == ""
    take_up()
    assert capsys.readouterr().err == f"warning: {error.value}\n"


def test_what_is_no_plain_file_is_one_line_too(place):
    place.parent.mkdir()
    os.mkfifo(place)
    for path in (place, place.parent, place.with_name("nowhere")):
        with pytest.raises(UsageError, match="can't be read"):
            tuned.read(path)
    job = replace(HERE, workers=3, local_workers=3)
    os.symlink("nowhere", tuned.path_for("x", job))
    assert "can't be used" in take_up(job=job)[2]


@pytest.mark.parametrize(
    ("job", "by_mpi", "mpi", "environ", "expected"),
    [
        (
            tuned.Job("torch", 2, 2, 2),
            False,
            "Open MPI",
            {},
            ["mpi", "horovod", "THREADS=2", "TIME=1", "TIME=5", "idle=0", "AFFINITY=1", "=1048576", "OLD=0", "ITY=0"],
        ),
        (
            tuned.Job("torch", 2, 2, 2),
            True,
            "Open MPI",
            {},
            ["horovod", "THREADS=2", "TIME=1", "TIME=5", "idle=0", "AFFINITY=1", "=1048576", "OLD=0", "ITY=0"],
        ),
        (
            tuned.Job("torch", 8, 8, 64),
            False,
            "none",
            {"HOROVOD_CYCLE_TIME": "50", "OMP_NUM_THREADS": "8", AFFINITY: "1"},
            ["THREADS=1", "THREADS=64", "TIME=0.2", "TIME=1", "TIME=5", "AFFINITY=0", "=1048576", "OLD=0", "ITY=0"],
        ),
        (
            tuned.Job("torch", 4, 4, 2),
            False,
            "MPICH",
            {"OMP_NUM_THREADS": "2"},
            ["mpi", "horovod", "THREADS=1", "TIME=1", "TIME=5", "=1048576", "OLD=0", "ITY=0"],
        ),
    ],
)
def test_what_is_tried_is_what_a_run_does_not_have_already(job, by_mpi, mpi, environ, expected):
    first = tune.Measured("x", job, np.ones(9), by_mpi)
    found = [f"{name}={value}" for _, change in tune.candidates(first, mpi, environ) for name, value in change.items()]
    assert len(found) == len(expected) and all(map(str.endswith, found, expected)), found
    assert {setting for setting, _ in tune.candidates(first, mpi, environ)} <= set(tune.SETTINGS)
    for name, value in (word.split("=") for word in found):
        assert re.fullmatch(tuned.ACCEPTED[name], value), "what is tried must be what the file may hold"


def test_malloc_is_left_alone_where_the_environment_sets_it():
    reasons = tuning.with_memory_kept(Choices(), {"MALLOC_ARENA_MAX": "2"}).reasons
    assert reasons == ("malloc left alone: MALLOC_ARENA_MAX is set",)


def test_a_freed_block_is_mapped_anew_but_where_malloc_keeps_it():
    """In a process of its own, whose page faults a second large block tells apart."""
    code = """
import ctypes, resource
from toolkit import tuning
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
plain = faults()
assert tuning.with_memory_kept(tuning.Choices(), {}).reasons
faults()
print(plain, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    plain, kept = map(int, done.stdout.split())
    assert plain >= 16 and kept < plain / 8, (plain, kept)  # 16384 pages of 4 KB, or 32 of 2 MB

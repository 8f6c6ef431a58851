"""Which worker this is, as each launcher's variables tell it; and what tuning makes of it."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from toolkit import tuning
from toolkit.world import World, from_launcher

QUOTA_OF_4 = {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, None),
        (
            {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"},
            World(3, 4, 1, 2),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            },
            World(5, 8, 1, 4),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            World(1, 2, 1, 2),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, World(1, 2, 0, 1)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0"}, World(2, 3, 0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3"}, None),
    ],
)
def test_from_launcher(environ, world):
    assert from_launcher(environ) == world


def test_cores_are_shared_among_the_hosts_workers():
    threads = [tuning.with_threads(tuning.Choices(), workers, {}, cores=8).threads for workers in (1, 4, 3, 16)]
    assert threads == [8, 2, 2, 1]


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/job", {"cpu.max": "200000 100000", "job/cpu.max": "max 100000"}, 2),
        ("0::/only/on/the/host", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "9900000 100000"}, 8),
        ("0::/", {"cpu.max": "what"}, 8),
        ("0::/", {"cpu.max": "1 0"}, 8),
        ("9:name=systemd:/\n3:cpuacct,cpu:/job", QUOTA_OF_4, 4),
        ("9:name=systemd:/\n3:cpuacct:/job", QUOTA_OF_4, 8),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1"}, 8),
        ("nonsense", {}, 8),
    ],
)
def test_a_quota_of_cpu_time_counts_as_so_many_cores(group, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for name, text in {"proc/self/cgroup": group, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert tuning.usable_cores(tmp_path) == expected


@contextlib.contextmanager
def group_of_one_core():
    """A control group of version 1 or 2 with a quota of one core, for a time; skipped where none can be made."""
    v1 = Path("/sys/fs/cgroup/cpu").is_dir()
    group = Path("/sys/fs/cgroup", "cpu" if v1 else "", f"hvdkit-test-{os.getpid()}")
    try:
        try:
            group.mkdir()
            (group / ("cpu.cfs_quota_us" if v1 else "cpu.max")).write_text("100000" if v1 else "100000 100000")
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        yield group
    finally:
        end = time.monotonic() + 10
        while group.exists():
            try:
                group.rmdir()
            except OSError:  # the kernel has not yet let go of a process that was in it
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


def test_a_real_quota_is_seen():
    with group_of_one_core() as group:
        code = f"open('{group}/cgroup.procs', 'w').write('0'); from toolkit.tuning import usable_cores as c; print(c())"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "1\n"


def test_what_the_user_set_is_left_alone():
    environ = {"OMP_NUM_THREADS": "3", "HOROVOD_CYCLE_TIME": "5"}
    found = tuning.with_threads(tuning.choose_environment(environ), 2, environ, cores=8)
    assert found.threads is None
    assert "HOROVOD_CYCLE_TIME" not in found.environment and "OMPI_MCA_mpi_yield_when_idle" in found.environment
    assert "HOROVOD_CYCLE_TIME=5 left alone" in found.explain() and "OMP_NUM_THREADS=3 is set" in found.explain()

"""Which worker this is, as each launcher's variables tell it; and what tuning makes of it."""

import pytest

from toolkit import tuning
from toolkit.world import World, from_launcher


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


def test_what_the_user_set_is_left_alone():
    environ = {"OMP_NUM_THREADS": "3", "HOROVOD_CYCLE_TIME": "5"}
    found = tuning.with_threads(tuning.choose_environment(environ), 2, environ, cores=8)
    assert found.threads is None
    assert "HOROVOD_CYCLE_TIME" not in found.environment and "OMPI_MCA_mpi_yield_when_idle" in found.environment
    assert "HOROVOD_CYCLE_TIME=5 left alone" in found.explain() and "OMP_NUM_THREADS=3 is set" in found.explain()

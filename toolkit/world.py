"""Which worker this process is, from the launcher's variables before Horovod starts, then from Horovod."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# (rank, size, local rank, local size), one line a launcher: horovodrun's Gloo workers, Open MPI,
# MPICH and Intel MPI (Hydra), Slurm.
_LAUNCHER_VARIABLES = (
    ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


@dataclass(frozen=True)
class World:
    """Where this process stands among the workers of one job.

    Attributes:
        rank: this worker, 0 … size − 1.
        size: number of workers.
        local_rank: this worker among those on its host, 0 … local_size − 1.
        local_size: number of workers on this host.
        cross_rank: this host among the hosts that have a worker of this local rank.
        cross_size: number of hosts that have a worker of this local rank.
        group: this worker's group, 0 … groups − 1, where the job trains several models at the same
            time; then rank and size are those within the group.
        groups: number of groups; 1 without them.
        device: what this worker computes on, in its framework's words: "cpu", "cuda:0" (torch, Keras on it) or "GPU:0"
            (TensorFlow, Keras on it).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    cross_rank: int = 0
    cross_size: int = 1
    group: int = 0
    groups: int = 1
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Rank and host, as messages name a worker: `rank 3 on node7`."""
        group = f" of group {self.group}" if self.groups > 1 else ""
        return f"rank {self.rank}{group} on {socket.gethostname()}"


def from_launcher(environ: Mapping[str, str] = os.environ) -> World | None:
    """The world as the launcher's variables tell it, for decisions made before Horovod starts.

    Returns:
        A `World` without cross ranks; None where no launcher is recognised.
    """
    for names in _LAUNCHER_VARIABLES:
        values = [environ.get(name, "") for name in names]
        if values[0].isdigit() and values[1].isdigit():
            rank, size = int(values[0]), int(values[1])
            local_rank = int(values[2]) if values[2].isdigit() else 0
            local_size = int(values[3]) if values[3].isdigit() else 1
            return World(rank, size, local_rank, local_size)
    return None


def from_horovod(hvd: Any) -> World:
    """The world as a started `horovod.torch` or `horovod.tensorflow` module tells it."""
    return World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size())

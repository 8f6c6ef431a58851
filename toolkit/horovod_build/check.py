"""Really all-reduces on 2 ranks: ``mpirun -np 2 python -m toolkit.horovod_build.check torch``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from .errors import BuildError
from .ingredients import Mpi
from .logged import first_error

RANKS = 2
TIMEOUT_SECONDS = 240


def all_reduce(name: str) -> list[float]:
    """Sum [1, 10] × (rank + 1) over all ranks in the library `name`: torch, tensorflow or mpi4py.

    Raises:
        RuntimeError: the ranks did not find each other, or Horovod was built without MPI.
    """
    if name == "mpi4py":
        from mpi4py import MPI

        size, rank = MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD.Get_rank()
        result = [MPI.COMM_WORLD.allreduce(value * (rank + 1.0)) for value in (1, 10)]
    elif name == "torch":
        import horovod.torch as hvd
        import torch

        hvd.init()
        size, rank = hvd.size(), hvd.rank()
        result = hvd.allreduce(torch.tensor([1.0, 10.0]) * (rank + 1), op=hvd.Sum).tolist()
    else:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        size, rank = hvd.size(), hvd.rank()
        result = hvd.allreduce(tf.constant([1.0, 10.0]) * (rank + 1.0), op=hvd.Sum).numpy().tolist()
    if size != RANKS:
        raise RuntimeError(f"{RANKS} ranks were started and this one sees {size}: mpirun is of another MPI.")
    return result


def run_check(name: str, mpi: Mpi, log: Path, nccl: bool = False) -> None:
    """All-reduce on 2 ranks in the library `name` and compare with the sum known beforehand.

    Args:
        name: torch, tensorflow or mpi4py.
        mpi: The MPI whose mpirun starts the ranks.
        log: The file that takes all output.
        nccl: Whether Horovod must have NCCL's operations.

    Raises:
        BuildError: the ranks failed, gave another sum or did not end in time.
    """
    command = [str(mpi.bin / "mpirun"), "-np", str(RANKS), sys.executable, "-m", __name__, name]
    if nccl:
        command.append("nccl")
    process = subprocess.Popen(
        command,
        env=launch_environment(),
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = f"ERROR: no answer in {TIMEOUT_SECONDS} s\n" + (process.communicate()[0] or "")
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n{output}")
    if process.returncode != 0:
        reason = "\n".join(f"    {line}" for line in first_error(output).splitlines())
        raise BuildError(
            f"Horovod is installed, but the all-reduce on {RANKS} ranks in {name} failed:\n{reason}\n"
            f"Full log: {log}\n"
            f"Run `{' '.join(command)}` to see it; `python -m toolkit.horovod_build --force` builds anew."
        )


def launch_environment() -> dict[str, str]:
    """Return an environment in which Open MPI 4, 5 and MPICH start 2 ranks as root and on one core."""
    return os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def main(name: str, nccl: bool = False) -> None:
    """All-reduce as one of the ranks and end with exit code 1 if the sum is wrong, or NCCL wanted and not there."""
    result = all_reduce(name)
    if nccl and not import_module(f"horovod.{name}").nccl_built():
        sys.exit(f"ERROR: the Horovod that {name} loads was built without NCCL")
    expected = [value * sum(range(1, RANKS + 1)) for value in (1.0, 10.0)]
    if result != expected:
        sys.exit(f"ERROR: the sum over {RANKS} ranks in {name} is {result}, expected {expected}")


if __name__ == "__main__":
    main(sys.argv[1], nccl=sys.argv[2:] == ["nccl"])

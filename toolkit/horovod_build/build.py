"""Compiles Horovod's source, with what `adjust_targets.cmake` says, and for a site's MPI mpi4py, into wheels."""

from __future__ import annotations

import os
import re
import shlex
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

from .cuda import Cuda, assemble
from .ingredients import FRAMEWORKS, Mpi, pinned_version
from .logged import pip, run_logged

_HERE = Path(__file__).parent


def download(folder: Path, log: Path) -> Path:
    """Fetch Horovod's source archive into `folder` and return its path.

    Raises:
        BuildError: pip could not get it.
    """
    requirement = f"horovod=={pinned_version('horovod', 'horovod')}"
    options = ("--no-binary", "horovod", "--no-deps", "--no-build-isolation", "--dest", str(folder))
    run_logged(
        pip("download", *options, requirement),
        log,
        f"Downloading {requirement}",
        "Check that pip reaches its package index (`pip config list` shows its settings), then run it again.",
        env=build_environment({}, None),
    )
    return next(folder.glob("horovod-*"))


def compile_horovod(
    source: Path,
    folder: Path,
    frameworks: Mapping[str, str],
    mpi: Mpi,
    cuda: Cuda | None,
    log: Path,
    on_percent: Callable[[int], None],
) -> Path:
    """Build Horovod's wheel from the archive `source` into `folder` and return its path.

    Args:
        source: Horovod's source archive.
        folder: An existing directory that takes the wheel and the generated CMake wrapper.
        frameworks: The frameworks to build for, by name.
        mpi: The MPI to build against.
        cuda: What to build GPU operations with; None: the build is for CPUs.
        log: The file that takes all output.
        on_percent: Called with the build's progress, 0 to 100.

    Raises:
        BuildError: the build failed.
    """

    def read_progress(line: str) -> None:
        if progress := re.match(r"\s*\[ *(\d+)%\]", line):
            on_percent(int(progress[1]))

    environment = build_environment(frameworks, mpi)
    if cuda:
        environment |= gpu_environment(folder, cuda, environment)
    environment["HOROVOD_CMAKE"] = str(write_cmake_wrapper(folder, mpi))
    run_logged(
        pip(
            "wheel",
            "-v",
            "--no-deps",
            "--no-build-isolation",
            "--no-cache-dir",
            "--wheel-dir",
            str(folder),
            str(source),
        ),
        log,
        "Building Horovod",
        "README lists the versions that are tested together; `make setup` installs them. If memory ran out, "
        "set MAX_JOBS=1 and run it again.",
        env=environment,
        on_line=read_progress,
    )
    return next(folder.glob("horovod-*.whl"))


def compile_mpi4py(folder: Path, mpi: Mpi, log: Path) -> Path:
    """Build mpi4py's wheel against `mpi` into `folder` and return its path.

    Raises:
        BuildError: the build failed.
    """
    requirement = f"mpi4py=={pinned_version('mpi', 'mpi4py')}"
    environment = build_environment({}, mpi)
    environment["MPICC"] = str(mpi.bin / "mpicc")
    # One file of 300,000 generated lines; with -O3 it takes minutes, and nothing in it is slow.
    environment["CFLAGS"] = f"-O1 {environment.get('CFLAGS', '')}".strip()
    # Without --no-cache-dir pip would take an mpi4py that it built against another MPI.
    options = ("-v", "--no-deps", "--no-binary", "mpi4py", "--no-cache-dir", "--wheel-dir", str(folder))
    advice = f"Check that {mpi.bin / 'mpicc'} compiles an MPI program."
    run_logged(pip("wheel", *options, requirement), log, f"Building {requirement}", advice, env=environment)
    return next(folder.glob("mpi4py-*.whl"))


def write_cmake_wrapper(folder: Path, mpi: Mpi) -> Path:
    """Write the command that Horovod's setup.py calls as CMake (HOROVOD_CMAKE) and return its path."""
    cmake = shlex.quote(str(Path(sysconfig.get_path("scripts")) / "cmake"))
    settings = {
        "CMAKE_PROJECT_INCLUDE": _HERE / "adjust_targets.cmake",
        "CMAKE_MODULE_PATH": _HERE,
        "MPI_CXX_COMPILER": mpi.bin / "mpicxx",
        "MPI_C_COMPILER": mpi.bin / "mpicc",
    }
    arguments = " ".join(shlex.quote(f"-D{name}={value}") for name, value in settings.items())
    wrapper = folder / "cmake-wrapper"
    wrapper.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --build) exec {cmake} "$@";; esac\n'
        f'exec {cmake} -G "Unix Makefiles" {arguments} "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper


def build_environment(frameworks: Mapping[str, str], mpi: Mpi | None) -> dict[str, str]:
    """Return the environment of a build: the user's, less what would steer Horovod or make elsewhere."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HOROVOD_") and name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEFILES")
    }
    path = environment.get("PATH", os.defpath)
    scripts = sysconfig.get_path("scripts")
    environment["PATH"] = f"{mpi.bin}:{path}:{scripts}" if mpi else path
    environment |= {
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITHOUT_NVTX": "1",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "MAKEFLAGS": f"-j{parallel_jobs()}",
        "HVDKIT_RPATH": mpi.rpath if mpi else "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CXX": environment.get("CXX", "g++"),
        "CC": environment.get("CC", "gcc"),
    }
    for name, variable in zip(FRAMEWORKS, ("PYTORCH", "TENSORFLOW"), strict=True):
        environment[f"HOROVOD_{'WITH' if name in frameworks else 'WITHOUT'}_{variable}"] = "1"
    return environment


def gpu_environment(folder: Path, cuda: Cuda, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a build with GPU operations adds to the `environment` of one for CPUs.

    Args:
        folder: An existing directory that takes the toolkit and NCCL as CMake expects them.
        cuda: What to build with.
        environment: The build's environment so far.
    """
    toolkit, nccl = assemble(folder, cuda)
    return {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_LINK": "SHARED",
        "HOROVOD_NCCL_HOME": str(nccl),
        "HOROVOD_CUDA_HOME": str(toolkit),
        "HOROVOD_BUILD_CUDA_CC_LIST": ",".join(cuda.architectures),
        "CUDA_HOME": str(toolkit),
        "PATH": f"{toolkit / 'bin'}:{environment['PATH']}",
        "HVDKIT_RPATH": f"{environment['HVDKIT_RPATH']}:{cuda.rpath}",
    }


def parallel_jobs() -> int:
    """Return how many compilers run at once: MAX_JOBS, else one a core and at most one per 2 GB of memory."""
    limit = os.environ.get("MAX_JOBS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gb // 2)))

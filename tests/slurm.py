"""Slurm's commands, which read all of their options before they ask a controller: there is none here.

They are this system's, or those that `python -m tests.slurm` fetches beside it. See `tests.packages` for the way. Its
exit code is always 0: without them, those tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import packages
from toolkit import launch

NAME = "slurm"
REACHED = "Unable to contact slurm controller"
_CONTROLLER = (
    "ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nGresTypes=gpu\nNodeName=node[1-2]\nMessageTimeout=1\n"
)


def needed(name: str, place: Path) -> tuple[str, dict[str, str]]:
    """A command's path, and what its environment has to have, to get as far as asking the controller.

    Args:
        name: srun or sbatch.
        place: a directory for its settings.

    Raises:
        pytest.skip.Exception: there is none.
    """
    program = _find(name)
    if program is None:
        pytest.skip(f"{name} is not installed{packages.why_none(NAME)}")
    return program, _environment(program, place)


def _find(name: str) -> str | None:
    fetched = packages.root(NAME) / "usr" / "bin" / name
    return launch._program(name, os.environ) or (str(fetched) if fetched.exists() else None)


def _environment(program: str, place: Path) -> dict[str, str]:
    """Settings written, and variables that name them, and what was fetched with the program."""
    environment, settings = {"SLURM_CONF": str(place / "slurm.conf")}, _CONTROLLER
    if Path(program).is_relative_to(packages.root(NAME)):
        environment["LD_LIBRARY_PATH"] = packages.libraries(NAME)
        settings += f"PluginDir={next(packages.root(NAME).rglob('auth_munge.so')).parent}\n"
    (place / "slurm.conf").write_text(settings)
    return environment


def _start() -> bool:
    """Whether srun and sbatch, the system's or those fetched, find their libraries and plugins."""
    for name in ("srun", "sbatch"):
        program = _find(name)
        try:
            with tempfile.TemporaryDirectory() as place:
                environment = {**os.environ, **_environment(program or name, Path(place))}
                kept = {"env": environment, "capture_output": True, "timeout": 10, "check": True}
                subprocess.run([program or name, "--version"], **kept)
        except (OSError, subprocess.SubprocessError, StopIteration):
            return False
    return True


if __name__ == "__main__":
    packages.provide(NAME, "slurm-client", r"slurm-\S+", _start, again="--again" in sys.argv[1:])

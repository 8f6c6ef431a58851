"""Settings of this process for this machine, chosen before Horovod starts.

The figures behind them are in the README's section on speed. Nothing that the user set is changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from toolkit import world


@dataclass(frozen=True)
class Choices:
    """What `choose` decided.

    Attributes:
        threads: compute threads for this process's framework; None leaves the framework's own choice.
        environment: variables to set before MPI and Horovod are initialised.
        reasons: one line for each choice.
    """

    threads: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    def apply_environment(self) -> None:
        """Set the variables; must come before `MPI_Init` and `hvd.init()` to have an effect."""
        os.environ.update(self.environment)

    def explain(self) -> str:
        """The choices and their reasons, a line each."""
        return "\n".join(f"tuning: {reason}" for reason in self.reasons) or "tuning: off"


def choose(environ: Mapping[str, str] = os.environ, cores: int | None = None) -> Choices:
    """Decide from the cores this process may use and the number of workers on this host.

    Args:
        environ: the environment, with the launcher's and the user's variables.
        cores: cores that this process may run on; None asks the operating system.
    """
    launched = world.from_launcher(environ)
    workers = launched.local_size if launched else 1
    available = len(os.sched_getaffinity(0)) if cores is None else cores
    threads: int | None = max(1, available // workers)
    reasons = [f"{threads} compute thread(s): {available} core(s) for {workers} worker(s) on this host"]
    if "OMP_NUM_THREADS" in environ:
        threads = None
        reasons = [f"compute threads left alone: OMP_NUM_THREADS={environ['OMP_NUM_THREADS']} is set"]
    wanted = {
        "OMPI_MCA_mpi_yield_when_idle": ("1", "Open MPI otherwise spins on the cores that compute"),
        "HOROVOD_CYCLE_TIME": (
            "0.2",
            "milliseconds between Horovod's looks at its queue; 1 delays small models",
        ),
    }
    chosen = {}
    for name, (value, reason) in wanted.items():
        if name in environ:
            reasons.append(f"{name}={environ[name]} left alone: it is set")
        else:
            chosen[name] = value
            reasons.append(f"{name}={value}: {reason}")
    return Choices(threads, chosen, tuple(reasons))

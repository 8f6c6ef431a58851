"""An ssh server for the test cluster: this system's, or one that `python -m tests.hosts.sshd` fetches beside it.

See `tests.packages` for the way. Its exit code is always 0: without a server, those tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests import packages

NAME = "sshd"
SBIN = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
# From OpenSSH 9.8 and 10.0 on sshd starts these for a login, and has paths of the system's built in.
_PARTS = {"SshdSessionPath": "usr/lib/openssh/sshd-session", "SshdAuthPath": "usr/lib/openssh/sshd-auth"}


@dataclass(frozen=True)
class Server:
    """An ssh server that starts here.

    Attributes:
        program: its path.
        libraries: directories of libraries that the system has not, for LD_LIBRARY_PATH; "" for none.
        parts: settings to paths of its other programs, where they are not at the system's.
    """

    program: str
    libraries: str = ""
    parts: tuple[tuple[str, Path], ...] = ()

    def starts(self) -> bool:
        """Whether it, its parts and their libraries are there: told of an unknown option, each says its version.

        `sshd -t` would say more, but needs the user and the directory that only the hosts of the cluster have.
        """
        environment = {**os.environ, "LD_LIBRARY_PATH": self.libraries} if self.libraries else None
        try:
            for program in (self.program, *(path for _, path in self.parts)):
                told = subprocess.run([program, "-?"], env=environment, capture_output=True, text=True, timeout=10)
                if "OpenSSH" not in told.stderr:
                    return False
        except (OSError, subprocess.TimeoutExpired):
            return False
        return True

    @property
    def settings(self) -> str:
        """Lines of sshd_config that it needs to find its parts."""
        return "".join(f"{setting} {path}\n" for setting, path in self.parts)


def find() -> Server | None:
    """The system's server, or else the one that was fetched."""
    installed = shutil.which("sshd", path=SBIN)
    servers = [Server(installed)] if installed else []
    fetched = packages.root(NAME)
    parts = tuple((setting, fetched / path) for setting, path in _PARTS.items() if (fetched / path).exists())
    servers.append(Server(str(fetched / "usr/sbin/sshd"), packages.libraries(NAME), parts))
    return next((server for server in servers if server.starts()), None)


if __name__ == "__main__":
    packages.provide(NAME, "openssh-server", "openssh-server", find, again="--again" in sys.argv[1:])

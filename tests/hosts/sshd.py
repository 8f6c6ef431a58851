"""An ssh server for the test cluster: this system's, or one unpacked beside it and installed nowhere.

`python -m tests.hosts.sshd` fetches one where the system has none: Debian's or Ubuntu's package, which apt checks
against the archive's signature, unpacked under `${HVDKIT_CACHE:-${XDG_CACHE_HOME:-~/.cache}/hvdkit}/sshd`. It needs
neither root nor this system's package lists. Its exit code is always 0: without a server, those tests are skipped.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from toolkit.horovod_build.wheel_cache import cache_directory

CACHE = cache_directory().parent / "sshd"
TIMEOUT = 30  # seconds for each of apt's and dpkg's commands
SBIN = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


@dataclass(frozen=True)
class Server:
    """An ssh server that starts here.

    Attributes:
        program: its path.
        libraries: directories of libraries that the system has not, for LD_LIBRARY_PATH; "" for none.
    """

    program: str
    libraries: str = ""

    def starts(self) -> bool:
        """Whether it and its libraries are there: told of an unknown option, it says which version it is."""
        environment = {**os.environ, "LD_LIBRARY_PATH": self.libraries} if self.libraries else None
        try:
            told = subprocess.run([self.program, "-?"], env=environment, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return "OpenSSH" in told.stderr


def find() -> Server | None:
    """The system's server, or else the one that was fetched."""
    installed = shutil.which("sshd", path=SBIN)
    servers = [Server(installed)] if installed else []
    fetched = CACHE / "root"
    libraries = os.pathsep.join(sorted({str(path.parent) for path in fetched.rglob("*.so.*")}))
    servers.append(Server(str(fetched / "usr/sbin/sshd"), libraries))
    return next((server for server in servers if server.starts()), None)


def why_none() -> str:
    """Why there is none, for those that can do nothing without."""
    try:
        failed = f": {(CACHE / 'failed').read_text()}"
    except OSError:
        failed = ""
    return f"there is no sshd: install openssh-server, or let `make test-hosts` fetch one{failed}"


def fetch() -> None:
    """Fetch one.

    Raises:
        OSError, subprocess.SubprocessError: apt or dpkg are not here, have failed, or took too long.
        LookupError: what they gave does not start.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        staging = Path(place)
        try:
            _download(staging, ())
        except subprocess.CalledProcessError:  # lists that are too old, or none, as in most images of containers
            lists = _own_lists(staging)
            _run(staging, "apt-get", *lists, "update")
            _download(staging, lists)
        for package in staging.glob("*.deb"):
            _run(staging, "dpkg-deb", "--extract", package, staging / "root")
        shutil.rmtree(CACHE / "root", ignore_errors=True)
        os.rename(staging / "root", CACHE / "root")
        (CACHE / "failed").unlink(missing_ok=True)
    if find() is None:
        raise LookupError("it does not start")


def _download(staging: Path, options: tuple[str, ...]) -> None:
    """The server's package and those libraries that it would bring with it, checked by apt."""
    plan = _run(staging, "apt-get", *options, "install", "--simulate", "--no-install-recommends", "openssh-server")
    names = set(re.findall(r"^Inst (openssh-server|lib\S+)", plan, re.MULTILINE)) | {"openssh-server"}
    _run(staging, "apt-get", *options, "-o", "APT::Sandbox::User=root", "download", *sorted(names))


def _own_lists(staging: Path) -> tuple[str, ...]:
    """Options of apt's that keep the lists, and all else that it writes, in a directory of ours."""
    state, cache = staging / "apt-state", staging / "apt-cache"
    (state / "lists" / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    settings = {"Dir::State::lists": state / "lists", "Dir::Cache": cache, "APT::Sandbox::User": "root"}
    return tuple(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))


def _run(directory: Path, *command: str | Path) -> str:
    words = [str(word) for word in command]
    environment = {**os.environ, "LC_ALL": "C"}
    kept = {"cwd": directory, "env": environment, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(words, check=True, timeout=TIMEOUT, **kept).stdout


def main() -> None:
    """Fetch one where there is none, and say what came of it in one line."""
    if find() is not None:
        return
    print("fetching     an ssh server for tests on several hosts", end="", flush=True)
    try:
        fetch()
    except (OSError, subprocess.SubprocessError, LookupError) as error:
        said = str(getattr(error, "stderr", "") or "").strip().splitlines() or [str(error)]
        print(f" failed: {said[-1][:200]}; those tests will be skipped")
        with contextlib.suppress(OSError):
            (CACHE / "failed").write_text(said[-1][:200])
    else:
        print(" ✓")


if __name__ == "__main__":
    main()

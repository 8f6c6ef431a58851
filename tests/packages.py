"""Programs for tests where the system has none: Debian's or Ubuntu's packages, unpacked in a cache, installed nowhere.

apt checks them against the archive's signature. They are kept in `${HVDKIT_CACHE:-${XDG_CACHE_HOME:-~/.cache}/hvdkit}`,
in a directory each. It needs neither root nor this system's package lists.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from toolkit.horovod_build.wheel_cache import cache_directory

CACHE = cache_directory().parent
TIMEOUT = 30  # seconds for each of apt's and dpkg's commands
AGAIN = 24 * 3600  # seconds after which a download that failed is tried again by itself


def root(name: str) -> Path:
    """The directory that holds what was fetched as in a system's root; it need not exist."""
    return CACHE / name / "root"


def libraries(name: str) -> str:
    """Directories of libraries that were fetched, for LD_LIBRARY_PATH; "" for none."""
    return os.pathsep.join(sorted({str(path.parent) for path in root(name).rglob("lib*.so*")}))


def why_none(name: str) -> str:
    """What the last download failed with, or that there was none; to follow what is missing."""
    try:
        return f"; its download failed: {(CACHE / name / 'failed').read_text()}"
    except OSError:
        return "; `make test` fetches one"


def provide(name: str, package: str, wanted: str, found: Callable[[], object], *, again: bool = False) -> None:
    """Fetch what is not found, and say what came of it in one line; tests that need it are skipped where that fails.

    Args:
        name: of its directory in the cache.
        package: that has the programs.
        wanted: regular expression of the packages that are needed with it, beside libraries.
        found: whether the programs are here and start.
        again: also where it has failed within the last day.
    """
    if found():
        return
    failed = CACHE / name / "failed"
    with contextlib.suppress(OSError):
        if not again and 0 <= time.time() - failed.stat().st_mtime < AGAIN:
            print(f"{package} is missing{why_none(name)}; tried again in a day; tests that need it will be skipped")
            return
    print(f"fetching     {package} for tests", end="", flush=True)
    try:
        fetch(package, wanted, root(name))
        if not found():
            raise LookupError("it does not start")
    except (OSError, subprocess.SubprocessError, LookupError) as error:
        said = (str(getattr(error, "stderr", "") or "").strip().splitlines() or [str(error)])[-1][:200]
        print(f" failed: {said}; tests that need it will be skipped")
        with contextlib.suppress(OSError):
            failed.write_text(said)
    else:
        failed.unlink(missing_ok=True)
        print(" ✓")


def fetch(package: str, wanted: str, into: Path) -> None:
    """Unpack a package, and of those that it would bring with it the libraries and what else is wanted.

    Raises:
        OSError, subprocess.SubprocessError: apt or dpkg are not here, have failed, or took too long.
    """
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as place:
        staging = Path(place)
        try:
            _download(staging, package, wanted, ())
        except subprocess.CalledProcessError:  # lists that are too old, or none, as in most images of containers
            lists = _own_lists(staging)
            _run(staging, "apt-get", *lists, "update")
            _download(staging, package, wanted, lists)
        for archive in staging.glob("*.deb"):
            _run(staging, "dpkg-deb", "--extract", archive, staging / "root")
        shutil.rmtree(into, ignore_errors=True)
        os.rename(staging / "root", into)


def _download(staging: Path, package: str, wanted: str, options: tuple[str, ...]) -> None:
    plan = _run(staging, "apt-get", *options, "install", "--simulate", "--no-install-recommends", package)
    names = set(re.findall(rf"^Inst (lib\S+|{wanted}) ", plan, re.MULTILINE)) | {package}
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

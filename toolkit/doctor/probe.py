"""What can be told of one host without importing a framework, and connections between hosts.

Its source is sent to the other hosts' Pythons, which may have no toolkit or be older than this one: so it takes nothing
but the standard library, from Python 3.8 on. `BOOT` runs first, in whatever Python is there.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

# Package to the distributions that may bring it.
PACKAGES = {
    "horovod": ("horovod",),
    "torch": ("torch",),
    "tensorflow": ("tensorflow-cpu", "tensorflow", "tf-nightly-cpu", "tf-nightly"),
    "keras": ("keras",),
    "mpi4py": ("mpi4py",),
    "numpy": ("numpy",),
}
MNIST = ("train-images", "train-labels", "t10k-images", "t10k-labels")
SKLEARN = ("digits.csv.gz", "diabetes_data_raw.csv.gz", "diabetes_target.csv.gz")
CLOCK_ROUNDS = 5

# A recipe, as any `python script.py`, does not look for modules in its working directory; `python -c` does.
_SAFE = "import sys; sys.path[:] = filter(None, sys.path); "
START = _SAFE + "import json; exec(json.loads(sys.stdin.readline()))"
# Tells the Python's version and, some times, the clock; then becomes the probe, with the ranks' variables.
BOOT = (
    f"""
SAFE = {_SAFE!r}"""
    + """
import json, os, sys, time
def say(answer):
    sys.stdout.write(TOKEN + json.dumps(answer) + "\\n")
    sys.stdout.flush()
say({"python": "%d.%d.%d" % sys.version_info[:3]})
for _ in range(ROUNDS):
    if not sys.stdin.readline():
        sys.exit(1)
    say({"time": time.time()})
job = json.loads(sys.stdin.readline())
os.environ.update(job["environment"])
try:
    os.chdir(job["directory"])
except OSError:
    pass
start = SAFE + "exec(sys.argv.pop(1))"
os.execve(sys.executable, [sys.executable, "-c", start, job["source"], TOKEN], os.environ)
"""
)

_GPU_SECONDS = 60  # a driver that keeps no state between programs takes some for each GPU
_LONGEST_LIFE = 900  # seconds: a probe whose doctor has vanished without a word ends by itself
_SIOCGIFADDR, _SIOCGIFNETMASK, _SIOCGIFFLAGS = 0x8915, 0x891B, 0x8913  # linux/sockios.h
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8


def facts(directory: str, data_dir: str | None = None) -> dict:
    """All that is compared between hosts, as JSON can hold it.

    Args:
        directory: where the ranks are to work.
        data_dir: where the recipes' `--data-dir` lies, or None for scikit-learn's data.
    """
    return {
        "python": [platform.python_version(), sys.executable],
        "packages": {name: package(name, brought_by) for name, brought_by in PACKAGES.items()},
        "toolkit": toolkit(),
        "built_for": built_for(),
        "mpirun": mpirun(),
        "cores": cores(),
        "shm": space("/dev/shm"),
        "directory": {"space": space(directory), "writable": os.access(directory, os.W_OK | os.X_OK)},
        "interfaces": interfaces(),
        "data": data(data_dir),
        "gpu_build": gpu_build(),
        "gpus": gpus(),
    }


def package(name: str, brought_by: tuple) -> list | None:
    """A package's version and directory, or None where it is not installed."""
    place = _place(name)
    for distribution in brought_by:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return [importlib.metadata.version(distribution), place]
    return None if not place else ["of unknown version", place]


def _place(name: str) -> str:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return ""
    return os.path.dirname(found.origin) if found and found.origin else ""


def toolkit() -> list | None:
    """Digest and directory of the toolkit's source files, or None where it is not importable."""
    place = _place("toolkit")
    if not place:
        return None
    digest = hashlib.sha256()
    for pattern in ("*.py", "*.cmake"):
        for path in sorted(glob.glob(os.path.join(place, "**", pattern), recursive=True)):
            digest.update(os.path.relpath(path, place).encode() + b"\0" + _sha256(path).encode())
    return [digest.hexdigest()[:12], place]


def built_for() -> dict:
    """Framework to the version that Horovod was built for, as its own metadata.json says; {} where it doesn't."""
    try:
        with open(os.path.join(_place("horovod"), "metadata.json"), encoding="utf-8") as file:
            told = json.load(file)
        return {
            name: str(told[key]) for name, key in (("torch", "pytorch"), ("tensorflow", "tensorflow")) if key in told
        }
    except (OSError, ValueError, TypeError):
        return {}


def mpirun() -> list | None:
    """Path of the `mpirun` that would be taken, and what it says of its version; None where there is none."""
    path = shutil.which("mpirun") or shutil.which("mpirun", path=os.path.dirname(sys.executable))
    if path is None:
        return None
    try:
        asked = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": 10}
        return [path, subprocess.run([path, "--version"], **asked).stdout.decode(errors="replace")[:400]]  # type: ignore[call-overload]
    except (OSError, subprocess.TimeoutExpired) as error:
        return [path, f"nothing ({getattr(error, 'strerror', None) or 'no answer in 10 s'})"]


def cores() -> list:
    """Cores that this process may run on, and as many of them as a quota allows, as the ranks will reckon there."""
    count = usable = len(os.sched_getaffinity(0))
    with contextlib.suppress(Exception):  # a host may have no toolkit, or another
        tuning = importlib.import_module("toolkit.tuning")
        count, usable = len(tuning.physical_cores(os.sched_getaffinity(0))), tuning.usable_cores()
    return [count, usable]


def gpu_build() -> list:
    """The frameworks for which Horovod was built with NCCL, by the names that its libraries ask for."""
    found = []
    for path in glob.glob(os.path.join(_place("horovod") or os.devnull, "*", "mpi_lib*.so")):
        with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
            library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if library.find(b"ncclAllReduce") >= 0:
                found.append(os.path.basename(os.path.dirname(path)))
    return sorted(found)


def gpus() -> dict:
    """What `gpu_probe` tells; {} where there is no GPU, nor its driver; where it says nothing, the `failure`."""
    path = os.path.join(_place("toolkit") or os.devnull, "doctor", "gpu_probe.py")
    if not os.path.isfile(path):
        return {}
    try:
        asked = subprocess.run([sys.executable, path], capture_output=True, timeout=_GPU_SECONDS)
        if not asked.returncode:
            return json.loads(asked.stdout.splitlines()[-1])
        said = asked.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {asked.returncode}"]
        return {"failure": said[0]}
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer in {_GPU_SECONDS} s"}
    except (OSError, ValueError, IndexError) as error:
        return {"failure": f"{type(error).__name__}: {error}"}


def space(path: str) -> list | None:
    """Bytes of a file system and those of them that are free to this user; None where there is none."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return [found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize]


def interfaces() -> dict:
    """Network interfaces that are up, without the loopback one, and their addresses as `10.0.0.1/24`."""
    import fcntl

    found: dict = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            words = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                flags = struct.unpack("H", fcntl.ioctl(asked, _SIOCGIFFLAGS, words)[16:18])[0]
                if flags & _IFF_LOOPBACK or not flags & _IFF_UP:
                    continue
                found[name] = []
                address = socket.inet_ntoa(fcntl.ioctl(asked, _SIOCGIFADDR, words)[20:24])
                mask = fcntl.ioctl(asked, _SIOCGIFNETMASK, words)[20:24]
                found[name].append(f"{address}/{bin(int.from_bytes(mask, 'big')).count('1')}")
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as file:
        for digits, _, prefix, scope, _, name in map(str.split, file):
            if scope == "00" and name in found:  # of global scope
                found[name].append(f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))}/{int(prefix, 16)}")
    return found


def data(data_dir: str | None) -> dict:
    """File name to SHA-256 of the recipes' data: MNIST's files in `data_dir`, or those that scikit-learn ships."""
    folder = data_dir or os.path.join(_place("sklearn"), "datasets", "data")
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    wanted = [name for name in names if (name.startswith(MNIST) if data_dir else name in SKLEARN)]
    return {name: _sha256(os.path.join(folder, name)) for name in wanted}


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return digest.hexdigest()


class Door:
    """A port that others can knock at: whoever connects is told the token, and so knows it has found this one."""

    def __init__(self, address: str, token: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind((address, 0))
        self._socket.listen(64)
        self._token = token.encode()
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), visitor:
                visitor.sendall(self._token)


def knock(addresses: list, seconds: float) -> list:
    """Connect to all of these [address, port, token] at the same time: None for each that is reached, or the reason."""
    reasons: list = ["no answer"] * len(addresses)

    def one(number: int, address: str, port: int, token: str) -> None:
        try:
            with socket.create_connection((address, port), timeout=seconds) as connection:
                heard = connection.makefile("rb").read(len(token))
            reasons[number] = None if heard == token.encode() else "another program answers there"
        except OSError as error:
            reasons[number] = error.strerror or "no answer"

    threads = [threading.Thread(target=one, args=(n, *each), daemon=True) for n, each in enumerate(addresses)]
    end = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return list(reasons)


def serve(token: str) -> None:
    """Answer the requests on standard input, a line each, until it ends."""
    signal.alarm(_LONGEST_LIFE)
    doors = []

    def say(answer: dict) -> None:
        sys.stdout.write(token + json.dumps(answer) + "\n")
        sys.stdout.flush()

    say({"ready": True})
    for line in sys.stdin:
        asked, answer = json.loads(line), {}  # type: dict, dict
        try:
            if "facts" in asked:
                answer = {"facts": facts(*asked["facts"])}
            elif "listen" in asked:
                doors.append(Door(asked["listen"], token))
                answer = {"port": doors[-1].port}
            else:
                answer = {"reasons": knock(asked["knock"], asked["seconds"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(answer)


if __name__ == "__main__":
    serve(sys.argv[1])

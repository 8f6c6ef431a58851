"""What Horovod's operations on GPUs are built with: CUDA, NCCL and architectures, found without a framework loaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from .errors import BuildError
from .ingredients import FRAMEWORKS, installed_version

#: The file of each framework that names the CUDA it was built for, and how it does.
_CUDA_OF = {
    "torch": ("version.py", r"^cuda\b[^=\n]*=\s*'([\d.]+)'"),
    "tensorflow": ("python/platform/build_info.py", r"'cuda_version', '([\d.]+)'"),
}

#: What pip is asked for to have each framework with CUDA. Of torch one version is many builds, and `==` takes any.
_WITH_CUDA = {"torch": "torch==={version}", "tensorflow": "'tensorflow[and-cuda]=={version}'"}

#: The CUDA whose compiler the extra `nvcc` of this distribution brings; PyPI has none before 13.
PYPI_MAJOR = 13

#: Where NVIDIA's installers put a CUDA toolkit.
SITE = Path("/usr/local")


#: Variables that CMake reads for CUDA, and nvcc.
FLAGS = ("CUDAFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")


@dataclass(frozen=True)
class Nccl:
    """An NCCL: its `version`, header and library."""

    version: str
    header: Path
    library: Path


@dataclass(frozen=True)
class Cuda:
    """What to build GPU operations with.

    `home` is the CUDA toolkit's directory, `version` its compiler's, `architectures` the compute capabilities without a
    dot, `rpath` where Horovod's libraries are told to look for NCCL and the CUDA runtime, separated by colons.
    """

    home: Path
    version: str
    architectures: tuple[str, ...]
    nccl: Nccl
    rpath: str

    def __str__(self) -> str:
        architectures = ", ".join(self.architectures)
        return f"nvcc {self.version} in {self.home} for {architectures}; NCCL {self.nccl.version}"


def directory(package: str) -> Path | None:
    """Return the directory of the importable `package`, or None; nothing is imported."""
    spec = util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def built_for(framework: str) -> str | None:
    """Return the version of CUDA that the installed `framework` was built for, such as "13.0"; None: a CPU build."""
    folder = directory(framework)
    file, pattern = _CUDA_OF[framework]
    try:
        found = re.search(pattern, (folder / file).read_text(), re.MULTILINE) if folder else None
    except OSError:
        return None
    return found[1] if found else None


def agreed_version(frameworks: dict[str, str]) -> str:
    """Return the version of CUDA that all of `frameworks` were built for: the lowest of one major version.

    Raises:
        BuildError: one is a CPU build, or installed twice, or two are for different major versions.
    """
    pip = f"{sysconfig.get_path('scripts')}/pip"
    versions = {}
    for name, text in frameworks.items():
        packages = [package for package in FRAMEWORKS[name] if installed_version(package)]
        if len(packages) > 1:
            raise BuildError(
                f"{' and '.join(packages)} are both installed and overwrite each other's files: "
                f"run `{pip} uninstall -y {' '.join(packages)}`, then the same command again."
            )
        version = built_for(name)
        if version is None:
            wanted = _WITH_CUDA[name].format(version=text.split()[-1].partition("+")[0])
            raise BuildError(
                f"{text} was built without CUDA, which a build for GPUs needs: run `{pip} uninstall -y "
                f"{' '.join(packages)} && {pip} install {wanted}`, then the same command again, or build with GPU=0."
            )
        versions[text] = version
    if len({version.partition(".")[0] for version in versions.values()}) > 1:
        raise BuildError(
            f"{' and '.join(f'{text} is for CUDA {version}' for text, version in versions.items())}, and one Horovod "
            "serves one: set up an environment for each, such as `make setup GPU=1 FRAMEWORKS=torch VENV=.venv-torch`."
        )
    return min(versions.values(), key=_numbers)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def nvcc_version(home: Path) -> str | None:
    """Return the version of the compiler in the CUDA toolkit at `home`, such as "13.0.88"; None: there is none."""
    found = re.search(r"release [\d.]+, V([\d.]+)", _output([str(home / "bin" / "nvcc"), "--version"]))
    return found[1] if found else None


def _named_home() -> str | None:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def _homes() -> list[Path]:
    """The directories where this machine may have a CUDA toolkit, the preferred first; where named, that alone."""
    if named := _named_home():
        return [Path(named)]
    said = _output([shutil.which("nvcc") or "", "--dryrun", "-x", "cu", os.devnull])
    # The nvcc on the PATH may be a link or a script; it knows itself where it is.
    tops = [Path(top).resolve() for top in re.findall(r"^#\$ TOP=(.*)$", said, re.MULTILINE)]
    return [*tops, SITE / "cuda", *sorted(SITE.glob("cuda-*"), reverse=True)]


def find_toolkit(frameworks: dict[str, str]) -> Path | None:
    """Return the directory of the CUDA toolkit to build with for `frameworks`; None: take PyPI's.

    It is of the frameworks' own major version. Without torch, whose headers and CUDA runtime Horovod shares, a newer
    one does too, if the driver is for that: Horovod's libraries for TensorFlow hold a CUDA runtime of their own.

    Raises:
        BuildError: there is none, and PyPI's does not suit; or the driver is older than the frameworks' version.
    """
    version = agreed_version(frameworks)
    major = _numbers(version)[0]
    driver = re.search(r"CUDA Version: ([\d.]+)", _output(["nvidia-smi"]))
    if driver and _numbers(driver[1])[0] < major:
        raise BuildError(
            f"{' and '.join(frameworks.values())} is for CUDA {version}, and this machine's driver serves {driver[1]}: "
            f"install a driver for CUDA {major}, or the framework's build for CUDA {_numbers(driver[1])[0]} "
            "(docs/gpus.md), or build with GPU=0."
        )
    newest = major if "torch" in frameworks else _numbers(driver[1])[0] if driver else PYPI_MAJOR
    found = {home.resolve(): nvcc_version(home) for home in _homes()}
    suitable = {
        home: _numbers(text)[0] for home, text in found.items() if text and major <= _numbers(text)[0] <= newest
    }
    if suitable:
        return min(suitable, key=lambda home: suitable[home])
    if major <= PYPI_MAJOR <= newest and not _named_home():
        return None
    seen = [f"nvcc {text} in {home}" for home, text in found.items() if text]
    seen += [f"a driver for CUDA {driver[1]}"] if driver else []
    raise BuildError(
        f"{' and '.join(frameworks.values())} is for CUDA {version}, and found was "
        f"{', '.join(seen) or f'no nvcc in {_named_home() or SITE} nor on the PATH'}: load a CUDA {major} toolkit "
        f"(a cluster: `module load cuda/{major}`), or name its directory in CUDA_HOME."
    )


def choose_architectures(wanted: str | None, home: Path) -> tuple[str, ...]:
    """Return the compute capabilities to build for: those `wanted`, or of this machine's GPUs, or else all of nvcc's.

    Args:
        wanted: such as "80,90"; None or "" looks at the GPUs here.
        home: the CUDA toolkit's directory.

    Raises:
        BuildError: nvcc does not compile for one.
    """
    known = re.findall(r"sm_(\d+)$", _output([str(home / "bin" / "nvcc"), "--list-gpu-code"]), re.MULTILINE)
    queried = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    chosen = re.split(r"[\s,]+", wanted.strip()) if wanted else re.findall(r"\d+\.\d+", queried)
    architectures = tuple(sorted({one.replace(".", "") for one in chosen}, key=lambda one: (len(one), one)))
    for one in architectures:
        if one not in known:
            said = f"GPU_ARCH={wanted}" if wanted else f"A GPU here has compute capability {one}"
            raise BuildError(
                f"{said}: nvcc {nvcc_version(home)} compiles for {', '.join(known)}; "
                "name those of your GPUs in GPU_ARCH, as 90 for an H100, or take another CUDA toolkit."
            )
    return architectures or tuple(known)


def _wheels() -> list[Path]:
    """The directories into which NVIDIA's wheels are installed, site-packages/nvidia."""
    spec = util.find_spec("nvidia")
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _library_path(folder: Path) -> str:
    """How Horovod's libraries name `folder`: relative to themselves where both are in this environment."""
    site_packages = Path(sysconfig.get_path("purelib"))
    # Up from site-packages/horovod/<framework>/.
    return f"$ORIGIN/../../{folder.relative_to(site_packages)}" if folder.is_relative_to(site_packages) else str(folder)


def find_nccl(major: str) -> Nccl:
    """Return the NCCL to build with: what NCCL_HOME names, or the wheel in this environment, or the site's.

    A process holds one libnccl.so.2, so that the wheel, which the framework loads, comes before the site's.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("NCCL_HOME")
    wheels = [folder / "nccl" for folder in _wheels()]
    for root in [Path(named)] if named else [*wheels, *_homes(), Path("/usr"), SITE]:
        header = root / "include" / "nccl.h"
        libraries = [
            folder / "libnccl.so.2" for folder in (root / "lib", root / "lib64", *root.glob("lib/*-linux-gnu"))
        ]
        library = next((path for path in libraries if path.exists()), None)
        if library and header.is_file():
            numbers = re.findall(r"^#define NCCL_(?:MAJOR|MINOR|PATCH) +(\d+)", header.read_text(), re.MULTILINE)
            return Nccl(".".join(numbers), header, library)
    raise BuildError(
        f"NCCL's include/nccl.h and lib/libnccl.so.2 are not in {named or 'this environment nor in /usr'}: "
        f"run `{sysconfig.get_path('scripts')}/pip install nvidia-nccl-cu{major}`, or name its directory in NCCL_HOME."
    )


def runtime_directory(major: str, home: Path) -> Path:
    """Return the directory of the CUDA runtime's library: the framework's wheel's, else the toolkit's at `home`."""
    for folder in _wheels():
        for inside in (f"cu{major}/lib", "cuda_runtime/lib"):
            if (folder / inside / f"libcudart.so.{major}").exists():
                return folder / inside
    return next((home / name for name in ("lib64", "lib") if (home / name).is_dir()), home / "lib64")


def find_cuda(frameworks: dict[str, str], home: Path | None, wanted: str | None) -> Cuda:
    """Return what to build GPU operations with for `frameworks`, which agree on a version of CUDA.

    Args:
        frameworks: the frameworks to build for, by name.
        home: the CUDA toolkit; None: that from PyPI in this environment.
        wanted: the architectures, such as "80,90"; None: those of the GPUs here.

    Raises:
        BuildError: something is missing or does not suit.
    """
    home = home or Path(sysconfig.get_path("purelib")) / "nvidia" / f"cu{PYPI_MAJOR}"
    version = nvcc_version(home)
    if version is None:
        raise BuildError(f"{home / 'bin' / 'nvcc'} does not run: install it again, or name a toolkit in CUDA_HOME.")
    nccl = find_nccl(agreed_version(frameworks).partition(".")[0])
    folders = (nccl.library.parent, runtime_directory(version.partition(".")[0], home))
    architectures = choose_architectures(wanted, home)
    return Cuda(home, version, architectures, nccl, ":".join(map(_library_path, folders)))


def assemble(folder: Path, cuda: Cuda) -> tuple[Path, Path]:
    """Make directories in `folder` that look to CMake as a CUDA toolkit and an NCCL are expected to.

    PyPI's wheels have neither lib64/ nor the names without a version that a linker looks for.

    Returns:
        The two, for HOROVOD_CUDA_HOME and HOROVOD_NCCL_HOME.
    """
    toolkit, nccl = folder / "cuda", folder / "nccl"
    for path in cuda.home.iterdir():
        if path.name not in ("bin", "lib", "lib64"):
            _link(path, toolkit / path.name)
    # nvcc looks for the rest from bin/.., which a link would lead out of here.
    for path in (cuda.home / "bin").iterdir():
        _link(path, toolkit / "bin" / path.name)
    runtime = runtime_directory(cuda.version.partition(".")[0], cuda.home)
    for source in (runtime, cuda.home / "lib", cuda.home / "lib64"):
        for path in source.glob("libcuda*"):
            _link(path, toolkit / "lib64" / path.name)
            _link(path, toolkit / "lib64" / re.sub(r"\.so\.\d.*", ".so", path.name))
    _link(cuda.nccl.header.parent, nccl / "include")
    for name in ("libnccl.so", "libnccl.so.2"):
        _link(cuda.nccl.library, nccl / "lib" / name)
    return toolkit, nccl


def _link(target: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(target)


def describe(cuda: Cuda, frameworks: dict[str, str]) -> dict[str, str]:
    """Return everything that a wheel's GPU operations depend on, as short texts by name."""
    flags = {name: os.environ[name] for name in FLAGS if os.environ.get(name)}
    return {
        "cuda": f"{agreed_version(frameworks)}, by nvcc {cuda.version} for {', '.join(cuda.architectures)}",
        "nccl": f"NCCL {cuda.nccl.version}",
        "gpu library path": cuda.rpath,
    } | flags


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # `nvcc --dryrun` speaks on standard error.
    return done.stdout + done.stderr if done.returncode == 0 else ""

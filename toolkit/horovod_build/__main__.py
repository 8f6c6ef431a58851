"""Builds, installs and proves Horovod for the installed frameworks: ``python -m toolkit.horovod_build``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from . import build, check, cuda, ingredients, logged, wheel_cache
from .cuda import Cuda
from .environment import prepare_environment
from .errors import BuildError
from .ingredients import FRAMEWORKS, Mpi


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the options; what is wrong in them ends the process with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.horovod_build", description=__doc__)
    parser.add_argument("--frameworks", help="torch,tensorflow or one of them; default: those installed")
    parser.add_argument("--mpi", choices=("pypi", "system"), default="pypi", help="whose MPI; system: mpicxx on PATH")
    parser.add_argument("--gpu", action="store_true", help="build the operations on GPUs too, with CUDA and NCCL")
    parser.add_argument("--gpu-arch", metavar="90", help="compute capabilities to build for; default: of the GPUs here")
    parser.add_argument("--force", action="store_true", help="build anew, whatever is installed or cached")
    parser.add_argument("--check-tools", action="store_true", help="only check for compilers, make and headers")
    parser.add_argument("--log", type=Path, default=Path(sys.prefix) / "horovod-build.log", help="the full log's file")
    options = parser.parse_args(arguments)
    if options.frameworks is not None:
        options.frameworks = [name for name in options.frameworks.split(",") if name]
        unknown = [name for name in options.frameworks if name not in FRAMEWORKS]
        if unknown or not options.frameworks:
            found = ", ".join(unknown) or "nothing"
            parser.exit(2, f"--frameworks names {found}; it takes {', '.join(FRAMEWORKS)}, separated by commas.\n")
    return options


@contextmanager
def stage(name: str, text: str = "") -> Iterator[None]:
    """Print one line for a stage: what it does, and how many seconds it took once it has ended well."""
    print(f"{name:<13}{text}", end="", flush=True)
    began = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f" ✓ {time.monotonic() - began:.0f} s", flush=True)


def differences(parts: dict[str, str], before: dict[str, str]) -> str:
    """Return what changed since Horovod was built, as ``torch: torch 2.12.1 then, torch 2.13.0 now``."""
    return "; ".join(
        f"{name}: {before.get(name, 'none')} then, {parts.get(name, 'none')} now"
        for name in sorted({*parts, *before})
        if parts.get(name) != before.get(name)
    )


def _stamp_path() -> Path:
    return Path(sys.prefix) / "etc" / "hvdkit-horovod.json"


def read_stamp() -> dict[str, str]:
    """Return what the installed, checked Horovod was built against; {} if there is none.

    The stamp counts only for the very wheel that pip recorded as installed.
    """
    try:
        stamp = json.loads(_stamp_path().read_text())
        origin = metadata.distribution("horovod").read_text("direct_url.json") or ""
    except (OSError, ValueError, metadata.PackageNotFoundError):
        return {}
    return stamp["built_against"] if f"/{stamp['key']}/" in origin else {}


def write_stamp(key: str, parts: dict[str, str]) -> None:
    """Record that the Horovod of the cache entry `key` is installed and all-reduced right."""
    _stamp_path().parent.mkdir(parents=True, exist_ok=True)
    _stamp_path().write_text(json.dumps({"key": key, "built_against": parts}, indent=2) + "\n")


def install_requirements(mpi: str, log: Path) -> None:
    """Install the pinned build tools, and PyPI's MPI unless the site's is taken, where they are missing.

    Raises:
        BuildError: pip failed.
    """
    advice = "Check that pip reaches its package index and may write to this environment, then run it again."
    if mpi == "pypi" and _built_here("mpi4py"):
        with stage("removing", "the mpi4py that was built against a site's MPI"):
            command = logged.pip("uninstall", "--yes", "mpi4py")
            logged.run_logged(command, log, "Removing mpi4py", advice)
    extras = ("horovod-build", "mpi") if mpi == "pypi" else ("horovod-build",)
    needed = ingredients.missing([line for extra in extras for line in ingredients.pins(extra)])
    if needed:
        with stage("installing", " ".join(needed)):
            logged.run_logged(logged.pip("install", *needed), log, "Installing the build tools", advice)


def _built_here(name: str) -> bool:
    """Tell whether the installed `name` was built from source: such an mpi4py belongs to a site's MPI."""
    try:
        # PyPI's wheels carry manylinux or musllinux in its place.
        return "-linux_" in (metadata.distribution(name).read_text("WHEEL") or "")
    except metadata.PackageNotFoundError:
        return False


def prepare_cuda(frameworks: dict[str, str], wanted: str | None, log: Path) -> Cuda:
    """Return what to build GPU operations with, after installing PyPI's compiler where this machine has none.

    Raises:
        BuildError: something is missing or does not suit, or pip failed.
    """
    home = cuda.find_toolkit(frameworks)
    needed = [] if home else ingredients.missing(ingredients.pins("nvcc"))
    if needed:
        with stage("installing", " ".join(needed)):
            advice = "Check that pip reaches its package index, or load a CUDA toolkit (often `module load cuda`)."
            logged.run_logged(logged.pip("install", *needed), log, "Installing CUDA's compiler", advice)
    return cuda.find_cuda(frameworks, home, wanted)


def build_wheels(
    key: str, parts: dict[str, str], frameworks: dict[str, str], mpi: Mpi, gpu: Cuda | None, log: Path
) -> list[Path]:
    """Download, build and store the wheels of the cache entry `key`, and return their paths.

    Raises:
        BuildError: a step failed.
    """
    shown = 0

    def show_percent(percent: int) -> None:
        nonlocal shown
        if percent >= shown + 25:
            shown = percent - percent % 25
            print(f" {shown} %", end="", flush=True)

    with tempfile.TemporaryDirectory(prefix="hvdkit-") as name:
        folder = Path(name)
        with stage("downloading", f"the source of Horovod {parts['horovod']}"):
            source = build.download(folder, log)
        wheels = []
        if mpi.flavour == "system":
            with stage("building", f"mpi4py {parts['mpi4py']} against {mpi.version}"):
                wheels.append(build.compile_mpi4py(folder, mpi, log))
        jobs = build.parallel_jobs()
        with stage("building", f"Horovod for {' and '.join(frameworks)}, some minutes on {jobs} cores; log {log} …"):
            wheels.append(build.compile_horovod(source, folder, frameworks, mpi, gpu, log, show_percent))
        return wheel_cache.store(key, parts, wheels)


def main(arguments: list[str]) -> None:
    """Run the stages; each prints one line.

    Raises:
        BuildError: one failed.
    """
    options = parse_arguments(arguments)
    what = "the compiler" + (" and the site's MPI" if options.mpi == "system" else "")
    # `make setup` has had it checked, and told, before it installs anything.
    with stage("checking", what) if options.check_tools else contextlib.nullcontext():
        compiler = ingredients.find_compiler()
        site_mpi = ingredients.system_mpi() if options.mpi == "system" else None
    if options.check_tools:
        return
    if site_mpi:
        ingredients.refuse_pypi_mpi()
    frameworks = ingredients.choose_frameworks(options.frameworks)
    gpu = prepare_cuda(frameworks, options.gpu_arch, options.log) if options.gpu else None
    install_requirements(options.mpi, options.log)
    mpi = site_mpi or ingredients.pypi_mpi()
    parts = ingredients.describe(frameworks, mpi, compiler) | {"recipe": wheel_cache.recipe_hash(gpu is not None)}
    if gpu:
        parts |= cuda.describe(gpu, frameworks)
    key = wheel_cache.cache_key(parts)
    before = read_stamp()
    if before == parts and not options.force:
        print(f"Horovod {parts['horovod']} is installed and checked for {', '.join(frameworks.values())}.")
        return
    if gpu:
        print(f"for GPUs     {gpu}")
    if before and before != parts:
        print(f"building anew, because of {differences(parts, before)}")
    options.log.unlink(missing_ok=True)
    if options.force:
        wheel_cache.discard(key)
    wheels = wheel_cache.find(key)
    if wheels:
        print(f"found        {wheels[-1]}")
    else:
        wheels = build_wheels(key, parts, frameworks, mpi, gpu, options.log)
    install(wheels, options.log)
    prepare_environment(mpi.flavour)
    for library in ("mpi4py", *frameworks):
        with stage("all-reducing", f"on {check.RANKS} ranks in {library}"):
            check.run_check(library, mpi, options.log, nccl=gpu is not None and library != "mpi4py")
    write_stamp(key, parts)


def install(wheels: list[Path], log: Path) -> None:
    """Install `wheels` in place of what is there.

    Raises:
        BuildError: pip failed.
    """
    with stage("installing", ", ".join(wheel.name for wheel in wheels)):
        options = ("--force-reinstall", "--no-deps", "--no-index")
        command = logged.pip("install", *options, *map(str, wheels))
        logged.run_logged(command, log, "Installing Horovod", "Check that the environment can be written to.")


if __name__ == "__main__":
    if sys.stdout.encoding.lower() != "utf-8" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except BuildError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")

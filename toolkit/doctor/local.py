"""This machine: Python, frameworks, Horovod and what it was built for, MPI, compilers, cores, shared memory, disk."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from toolkit.doctor import gpus, imports, on_gpus, probe, processes
from toolkit.doctor.checks import Check
from toolkit.doctor.compare import Facts
from toolkit.doctor.resources import resources
from toolkit.errors import UsageError
from toolkit.launch import Installed

FRAMEWORKS = ("torch", "tensorflow")
IMPORT_SECONDS = 120.0  # from a file system that is cold and far away it takes that long
_OLDEST = (3, 10)
_BUILD = "python -m toolkit.horovod_build"
_SETUP = "make setup"
_LIBRARY = re.compile(r"(Open MPI) v(\d+\.\d+[\d.]*)|(MPICH) Version: +(\d+\.\d+[\d.]*)")

Imports = Mapping[str, Mapping[str, Any]]


async def look(
    facts: Facts, mpirun: Installed | UsageError, ranks: int | None = None, wanted: Sequence[str] = FRAMEWORKS
) -> AsyncIterator[Check]:
    """The checks of this machine but for the all-reduce, in order.

    Args:
        facts: this machine's.
        mpirun: what there is to launch with, or why there is nothing.
        ranks: planned here; None: not known.
        wanted: of the frameworks; the others are left out.
    """
    begun = asyncio.ensure_future(_import_all(facts, wanted))
    try:
        yield _python(facts)
        imported = await begun
    finally:
        begun.cancel()
    found = [*frameworks(facts, imported, wanted), *horovod(facts, imported, wanted), *_mpi(facts, imported, mpirun)]
    for check in found:
        yield check
    yield await _compilers(with_cuda=bool(facts["gpus"]))
    for check in [*resources(facts, "", ranks), *gpus.of_host(facts, "", ranks), *on_gpus.checks(facts, imported)]:
        yield check


async def _import_all(facts: Facts, wanted: Sequence[str]) -> Imports:
    """What `imports.found` tells for each that is wanted and installed, all at the same time."""
    there = [what for what in (*wanted, "mpi4py") if facts["packages"][what]]
    found = await asyncio.gather(*(_import(what, _backend(facts, wanted)) for what in there))
    return dict(zip(there, found, strict=True))


def _backend(facts: Facts, wanted: Sequence[str]) -> str:
    """The user's choice for Keras, or the one that comes first among those that are wanted."""
    default = "tensorflow" if "tensorflow" in wanted and facts["packages"]["tensorflow"] else "torch"
    return os.environ.get("KERAS_BACKEND") or default


async def _import(what: str, backend: str) -> dict[str, Any]:
    # Where both are absent, an MPI of one process looks for no daemon.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMPI_MCA_ess_singleton_isolated": "1"}
    environment = {**quiet, **os.environ, "KERAS_BACKEND": backend}
    ended = await processes.run([sys.executable, "-m", imports.__name__, what], IMPORT_SECONDS, environment)
    for line in ended.out.splitlines():
        if line.startswith(imports.MARK):
            return json.loads(line[len(imports.MARK) :])
    said = (ended.err.strip().splitlines() or ["nothing said"])[-1]
    if ended.code is None:
        reason = f"importing it does not end in {IMPORT_SECONDS:g} s"
    elif ended.code < 0:
        reason = f"importing it ended the process by {signal.Signals(-ended.code).name}; {said}"
    else:
        reason = f"importing it ended the process with code {ended.code}; {said}"
    return {what: {"ok": False, "found": reason}}


def _python(facts: Facts) -> Check:
    version, place = facts["python"]
    ok = sys.version_info >= _OLDEST
    fix = "" if ok else f"make the environment with Python {'.'.join(map(str, _OLDEST))} or newer: make setup PYTHON=…"
    return Check("python", "", ok, f"{version} at {place}", fix)


def frameworks(facts: Facts, imported: Imports, wanted: Sequence[str]) -> list[Check]:
    """The frameworks that are wanted, and Keras on one of them."""
    packages = facts["packages"]
    checks = []
    for name in wanted:
        if packages[name]:
            checks.append(_of_import(name, imported[name][name], _anew(name, packages[name][0])))
        elif any(packages[other] for other in wanted):
            checks.append(Check(name, "", None, "not installed"))
        else:
            checks.append(Check(name, "", False, "not installed", f"{_SETUP} FRAMEWORKS={name}"))
    return checks + _keras(facts, imported, wanted)


def _keras(facts: Facts, imported: Imports, wanted: Sequence[str]) -> list[Check]:
    backend = _backend(facts, wanted)
    if not facts["packages"]["keras"]:
        return [Check("keras", "", None, "not installed")]
    if backend in FRAMEWORKS and backend not in wanted:
        return []
    if backend not in imported:
        fix = "set KERAS_BACKEND to tensorflow or torch, whichever is installed, and unset it for the default"
        return [Check("keras", "", False, f"its backend is {backend}, which Horovod or this machine lacks", fix)]
    outcome = imported[backend].get("keras", {"ok": False, "found": f"{backend} fails first"})
    return [_of_import("keras", outcome, _anew("keras", facts["packages"]["keras"][0]), f" on {backend}")]


def _anew(name: str, version: str) -> str:
    """How to install a package anew as it is: another version, or another's, is not what Horovod was built for."""
    for distribution in probe.PACKAGES[name]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(distribution)
            return f"pip install --force-reinstall --no-deps {distribution}=={version}"
    return _SETUP


def _of_import(name: str, outcome: Mapping[str, Any], fix: str, more: str = "") -> Check:
    if outcome["ok"]:
        took = f", imported in {outcome['seconds']:.1f} s" if outcome["seconds"] >= 0.05 else ", imported"
        return Check(name, "", True, f"{outcome['found']}{more}{took}")
    return Check(name, "", False, f"can't be imported: {outcome['found']}", fix)


def horovod(facts: Facts, imported: Imports, wanted: Sequence[str]) -> list[Check]:
    """Horovod, and for each framework that is wanted whether it is the one that Horovod was built for."""
    if not facts["packages"]["horovod"]:
        return [Check("horovod", "", False, "not installed", f"{_BUILD}: builds it for what is installed, in minutes")]
    version, _ = facts["packages"]["horovod"]
    built = facts["built_for"]
    there = {name: facts["packages"][name][0] for name in wanted if facts["packages"][name]}
    checks = [horovod_for(name, its, built, imported[name]) for name, its in there.items()]
    told = " and ".join(f"{name} {of}" for name, of in built.items())
    found = f"{version}, built for {told}" if told else f"{version}, which does not tell what it was built for"
    if there and all(check.ok is None for check in checks):
        fix = f"{_BUILD} --frameworks {','.join(sorted({*built, *there}))}: builds it anew, in minutes"
        why = "; ".join(f"{name}: {check.found}" for name, check in zip(there, checks, strict=True))
        return [Check("horovod", "", False, f"{found}; {why}", fix)]
    return [Check("horovod", "", True, found), *checks]


def horovod_for(name: str, installed: str, built: Mapping[str, str], imported: Mapping[str, Any]) -> Check:
    """Whether Horovod serves the installed version of a framework.

    Args:
        name: the framework.
        installed: its version.
        built: framework to the version that Horovod was built for.
        imported: what `imports.found` told.
    """
    label, anew = f"horovod for {name}", f"{_BUILD}: builds it anew for {name} {installed}, in minutes"
    outcome = imported.get(f"horovod.{name}")
    if not built and outcome is not None and outcome["ok"]:  # a site's own build may have no metadata.json
        return Check(label, "", True, f"imported; for which {name} it was built, it does not tell")
    if name not in built and (built or outcome is not None):
        hint = f"to train with it: {_BUILD} --frameworks {','.join(sorted({*built, name}))}"
        why = f" ({outcome['found']})" if not built and outcome is not None else ""
        return Check(label, "", None, f"not built for it{why}", hint)
    if not _same(built.get(name, installed), installed):
        found = f"built for {name} {built[name]}, and {installed} is installed"
        if outcome is not None:
            found += "; by luck it can be imported" if outcome["ok"] else f"; can't be imported: {outcome['found']}"
        return Check(label, "", False, found, anew)
    if outcome is None:
        return Check(label, "", False, f"{name} itself can't be imported", f"mend {name} first")
    if not outcome["ok"]:
        return Check(label, "", False, f"can't be imported: {outcome['found']}", f"{_BUILD} --force")
    return Check(label, "", True, f"built for {name} {installed}, the installed one, and imported")


def _same(one: str, other: str) -> bool:
    """Whether two versions are the same; 2.11.0 is 2.11.0+cu130, as a package may leave out what its module tells."""
    if "+" in one and "+" in other:
        return one == other
    return one.partition("+")[0] == other.partition("+")[0]


def _mpi(facts: Facts, imported: Imports, mpirun: Installed | UsageError) -> list[Check]:
    """mpirun, and Horovod's and mpi4py's MPI libraries against it."""
    path, _ = facts["mpirun"] or ("", "")
    if isinstance(mpirun, UsageError):
        fix = "activate the environment (`source .venv/bin/activate`), or load the site's MPI module"
        checks = [Check("mpirun", "", False, str(mpirun), fix)]
    else:
        checks = [Check("mpirun", "", True, f"{_named(mpirun)} at {path}")]
    for label, sources in (("MPI of horovod", FRAMEWORKS), ("MPI of mpi4py", ("mpi4py",))):
        libraries = [imported[source]["mpi"] for source in sources if "mpi" in imported.get(source, {})]
        outcome = imported.get("mpi4py", {}).get("mpi4py", {"ok": True})
        if label == "MPI of mpi4py" and not outcome["ok"]:
            fix = f"{_anew('mpi4py', facts['packages']['mpi4py'][0])}; with a site's MPI: {_SETUP} MPI=system"
            checks.append(Check(label, "", False, f"can't be imported: {outcome['found']}", fix))
        elif libraries:
            place, says = libraries[0]
            checks.append(library(label, place, says, None if isinstance(mpirun, UsageError) else mpirun, path))
        else:
            checks.append(Check(label, "", None, "none loaded"))
    return checks


def library(label: str, path: str, says: str, mpirun: Installed | None, starter: str) -> Check:
    """A loaded MPI library against mpirun: of the same MPI, and the same series of its versions.

    Args:
        label: the check's name.
        path: the library's file.
        says: what it says of its version.
        mpirun: what there is to launch with; None: nothing.
        starter: mpirun's path.
    """
    told = _LIBRARY.search(says)
    if told is None or mpirun is None:
        what = f"{told[1] or told[3]} {told[2] or told[4]}" if told else (says.splitlines() or ["an MPI"])[0]
        return Check(label, "", None, f"{what} in {path}; nothing to compare with")
    kind, version = (part for part in told.groups() if part)
    found = f"{kind} {version} in {path}"
    if kind == mpirun.mpi and tuple(map(int, version.split(".")[:2])) == mpirun.version:
        return Check(label, "", True, f"{found}, as mpirun")
    own = os.path.join(os.path.dirname(os.path.dirname(path)), "bin")
    fix = f"put the mpirun of that library first on the PATH (it may be in {own}), or build against {starter}: "
    return Check(label, "", False, f"{found}; mpirun is {_named(mpirun)} at {starter}", f"{fix}{_SETUP} MPI=system")


def _named(mpirun: Installed) -> str:
    return f"{mpirun.mpi} {'.'.join(map(str, mpirun.version))}"


async def _compilers(with_cuda: bool) -> Check:
    """What there is to build Horovod anew with; nothing else needs it."""
    found = []
    for name in (os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc"), "make"):
        path = shutil.which(name.split()[0]) if name.split() else None
        if path is None:
            hint = "Debian, Ubuntu: `apt install g++ make`; a cluster: `module load gcc`"
            return Check("compilers", "", None, f"no {name}: needed only to build Horovod anew", hint)
        said = (await processes.run([path, "--version"], 10)).out
        version = re.search(r"\d+\.\d+(?:\.\d+)?", said.partition("\n")[0].rpartition(")")[2] or said)
        found.append(f"{name} {version[0] if version else ''}".strip())
    if with_cuda:
        found.append(await _nvcc())
    return Check("compilers", "", True, ", ".join(found))


async def _nvcc() -> str:
    path = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]))
    if path is None:
        return "no nvcc, which a build for GPUs needs"
    version = re.search(r"release (\d+\.\d+)", (await processes.run([path, "--version"], 10)).out)
    return f"nvcc {version[1] if version else ''}".strip()

"""This machine: Python, frameworks, Horovod and what it was built for, MPI, compilers, cores, shared memory, disk."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from toolkit import launch
from toolkit.doctor import imports, processes
from toolkit.doctor.checks import Check
from toolkit.doctor.compare import Facts
from toolkit.doctor.resources import resources
from toolkit.errors import UsageError

FRAMEWORKS = ("torch", "tensorflow")
IMPORT_SECONDS = 120.0  # from a file system that is cold and far away it takes that long
_OLDEST = (3, 10)
_BUILD = "python -m toolkit.horovod_build"
_VERSIONS = re.compile(r"(Open MPI)\)? v?(\d+(?:\.\d+)+)|(?:MPICH Version|^ *Version): +(\d+(?:\.\d+)+)", re.MULTILINE)

Imports = Mapping[str, Mapping[str, Any]]


async def look(facts: Facts, ranks: int | None = None, wanted: Sequence[str] = FRAMEWORKS) -> AsyncIterator[Check]:
    """The checks of this machine but for the all-reduce, in order.

    Args:
        facts: this machine's.
        ranks: planned here; None: not known.
        wanted: of the frameworks; the others are left out.
    """
    left_out = [name for name in FRAMEWORKS if name not in wanted]
    facts = {**facts, "packages": {**facts["packages"], **dict.fromkeys(left_out)}}
    begun = asyncio.ensure_future(_import_all(facts))
    try:
        yield _python(facts)
        imported = await begun
    finally:
        begun.cancel()
    for check in (*_frameworks(facts, imported), *_horovod(facts, imported), *_mpi(facts, imported)):
        yield check
    yield await _compilers()
    for check in resources(facts, "", ranks):
        yield check


async def _import_all(facts: Facts) -> Imports:
    """What `imports.found` tells for each that is installed, all at the same time."""
    there = [what for what in imports.WHAT if facts["packages"][what]]
    found = await asyncio.gather(*(_import(what, facts) for what in there))
    return dict(zip(there, found, strict=True))


async def _import(what: str, facts: Facts) -> dict[str, Any]:
    default = "tensorflow" if facts["packages"]["tensorflow"] else "torch"
    # Where both are absent, an MPI of one process looks for no daemon.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMPI_MCA_ess_singleton_isolated": "1"}
    environment = {"KERAS_BACKEND": default, **quiet, **os.environ}
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


def _frameworks(facts: Facts, imported: Imports) -> list[Check]:
    packages = facts["packages"]
    checks = []
    for name in FRAMEWORKS:
        if packages[name]:
            checks.append(_of_import(name, imported[name][name], f"pip install --force-reinstall {name}"))
        elif any(packages[other] for other in FRAMEWORKS):
            checks.append(Check(name, "", None, "not installed"))
        else:
            checks.append(
                Check(name, "", False, "not installed, nor another framework", f"pip install 'hvdkit[{name}]'")
            )
    backend = os.environ.get("KERAS_BACKEND") or ("tensorflow" if packages["tensorflow"] else "torch")
    if not packages["keras"]:
        checks.append(Check("keras", "", None, "not installed"))
    elif backend not in imported:
        fix = "set KERAS_BACKEND to tensorflow or torch, whichever is installed, and unset it for the default"
        checks.append(Check("keras", "", False, f"its backend is {backend}, which Horovod or this machine lacks", fix))
    else:
        outcome = imported[backend].get("keras", {"ok": False, "found": f"{backend} fails first"})
        checks.append(_of_import("keras", outcome, "pip install --force-reinstall keras", f" on {backend}"))
    return checks


def _of_import(name: str, outcome: Mapping[str, Any], fix: str, more: str = "") -> Check:
    if outcome["ok"]:
        took = f", imported in {outcome['seconds']:.1f} s" if outcome["seconds"] >= 0.05 else ", imported"
        return Check(name, "", True, f"{outcome['found']}{more}{took}")
    return Check(name, "", False, f"can't be imported: {outcome['found']}", fix)


def _horovod(facts: Facts, imported: Imports) -> list[Check]:
    """Horovod, and for each framework whether it is the one that Horovod was built for."""
    if not facts["packages"]["horovod"]:
        return [Check("horovod", "", False, "not installed", f"{_BUILD}: builds it for what is installed, in minutes")]
    version, place = facts["packages"]["horovod"]
    built = facts["built_for"]
    told = " and ".join(f"{name} {of}" for name, of in built.items()) or "nothing that it tells of"
    checks = [Check("horovod", "", True, f"{version}, built for {told}")]
    for name in FRAMEWORKS:
        if facts["packages"][name]:
            checks.append(horovod_for(name, facts["packages"][name][0], built, imported[name]))
    return checks


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
    if name not in built:
        hint = f"to train with it: {_BUILD} --frameworks {','.join(sorted({*built, name}))}"
        return Check(label, "", None, "not built for it", hint)
    if built[name] != installed:
        found = f"built for {name} {built[name]}, and {installed} is installed"
        if outcome is not None:
            found += "; by luck it can be imported" if outcome["ok"] else f"; can't be imported: {outcome['found']}"
        return Check(label, "", False, found, anew)
    if outcome is None:
        return Check(label, "", False, f"{name} itself can't be imported", f"mend {name} first")
    if not outcome["ok"]:
        return Check(label, "", False, f"can't be imported: {outcome['found']}", f"{_BUILD} --force")
    return Check(label, "", True, f"built for {name} {installed}, the installed one, and imported")


def mpi_of(text: str) -> tuple[str, str] | None:
    """Kind and version of an MPI: (Open MPI, 4.1.8), from what its library or its mpirun says; None for others."""
    found = _VERSIONS.search(text)
    if not found:
        return None
    return ("Open MPI", found[2]) if found[1] else ("MPICH", found[3])


def _mpi(facts: Facts, imported: Imports) -> list[Check]:
    """mpirun, and Horovod's and mpi4py's MPI libraries against it."""
    checks = []
    try:
        launch.find("mpirun", os.environ)
        path, says = facts["mpirun"]
        starter = mpi_of(says)
        checks.append(Check("mpirun", "", True, f"{' '.join(starter or ('of unknown version',))} at {path}"))
    except UsageError as error:
        starter, path = None, ""
        fix = "activate the environment (`source .venv/bin/activate`), or load the site's MPI module"
        checks.append(Check("mpirun", "", False, str(error), fix))
    for label, sources in (("MPI of horovod", FRAMEWORKS), ("MPI of mpi4py", ("mpi4py",))):
        libraries = [imported[source]["mpi"] for source in sources if "mpi" in imported.get(source, {})]
        outcome = imported.get("mpi4py", {}).get("mpi4py", {"ok": True})
        if label == "MPI of mpi4py" and not outcome["ok"]:
            fix = "pip install --force-reinstall mpi4py; with a site's MPI: make setup MPI=system"
            checks.append(Check(label, "", False, f"can't be imported: {outcome['found']}", fix))
        elif libraries:
            place, said = libraries[0]
            checks.append(library(label, place, said, starter, path))
        else:
            checks.append(Check(label, "", None, "none loaded"))
    return checks


def library(label: str, path: str, says: str, starter: tuple[str, str] | None, mpirun: str) -> Check:
    """A loaded MPI library against mpirun.

    Args:
        label: the check's name.
        path: the library's file.
        says: what it says of its version.
        starter: kind and version of mpirun; None: not known.
        mpirun: its path.
    """
    kind = mpi_of(says)
    found = f"{' '.join(kind) if kind else says.splitlines()[0]} in {path}"
    if kind is None or starter is None:
        return Check(label, "", None, f"{found}; nothing to compare with")
    if kind == starter:
        return Check(label, "", True, f"{found}, as mpirun")
    if kind[0] == starter[0] and kind[1].split(".")[:2] == starter[1].split(".")[:2]:
        return Check(label, "", True, f"{found}, of the same series as mpirun's {starter[1]}")
    own = os.path.join(os.path.dirname(os.path.dirname(path)), "bin")
    fix = f"put the mpirun of that library first on the PATH (it may be in {own}), or build against {mpirun}: "
    fix += "make setup MPI=system"
    return Check(label, "", False, f"{found}; mpirun is {' '.join(starter)} at {mpirun}", fix)


async def _compilers() -> Check:
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
    return Check("compilers", "", True, ", ".join(found))

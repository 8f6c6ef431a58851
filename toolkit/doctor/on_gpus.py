"""What this machine's frameworks and Horovod make of its GPUs: pure functions of facts and of `imports.found`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from toolkit.doctor.checks import Check
from toolkit.doctor.gpus import SETUP, Facts, read


def checks(facts: Facts, imported: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """Whether this machine's frameworks compute on its GPUs, and with which NCCL Horovod adds up there.

    [] where Horovod was built without NCCL for all of them.

    Args:
        facts: this machine's.
        imported: what `imports.found` told for each.
    """
    seen, found = read(facts), []
    for name, told in imported.items():
        built = name in facts["gpu_build"]
        if facts["gpu_build"] and seen is not None and seen.names and "cuda" in told:
            found.append(_framework(name, told["cuda"], len(seen.names), built))
        if built and "nccl" in told:
            found.append(_nccl(name, **told["nccl"]))
    return found


def ready(framework: str, facts: Facts, checks: Iterable[Check]) -> int:
    """This machine's GPUs on which Horovod can add up for a framework, by the checks so far."""
    seen, well = read(facts), {check.name for check in checks if check.ok}
    wanted = {f"{framework} on GPUs", f"NCCL for {framework}"}
    return len(seen.names) if seen is not None and wanted <= well else 0


def _framework(name: str, told: Mapping[str, Any], count: int, built: bool) -> Check:
    label, wrong = f"{name} on GPUs", False if built else None
    if told["version"] is None and not told["wrong"]:
        fix = f"to train on GPUs with it: {SETUP} FRAMEWORKS={name}"
        return Check(label, "", wrong, "a build without CUDA", fix)
    if told["wrong"]:
        fix = f"see what is wrong above, or what else uses the GPUs (`nvidia-smi`); else {SETUP} FRAMEWORKS={name}"
        return Check(label, "", wrong, told["wrong"], fix)
    if told["gpus"] < count:
        found = f"built for CUDA {told['version']}, and sees {told['gpus']} of {count} GPUs"
        fix = f"see what it says: `python -c 'import {name}'`; install a build that the driver above serves"
        return Check(label, "", wrong, found, fix)
    return Check(label, "", True, f"built for CUDA {told['version']}, adds up right on {count} of {count}")


def _nccl(name: str, built: int, loaded: Mapping[str, int]) -> Check:
    label = f"NCCL for {name}"
    told = " and ".join(f"{_version(number)} in {path}" for path, number in loaded.items()) or "none is loaded"
    found = f"{told}; built with {_version(built)}"
    if min(loaded.values(), default=0) < built:
        fix = f"install {_version(built)} or newer, or build Horovod anew for this one: {SETUP} FRAMEWORKS={name}"
        return Check(label, "", False, found, fix)
    hint = "" if len(loaded) == 1 else "which of them Horovod calls is chance: take one out of LD_LIBRARY_PATH"
    return Check(label, "", True, found, hint)


def _version(number: int) -> str:
    """Of NCCL's number (nccl.h: NCCL_VERSION, from 2.9 on)."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"

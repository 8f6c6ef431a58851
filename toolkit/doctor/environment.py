"""`hvdkit env`: what belongs in a bug report, without secrets, home directories and users' names."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

from toolkit import launch
from toolkit.doctor import gpus, nccl, probe
from toolkit.doctor.checks import one_line
from toolkit.doctor.resources import amount
from toolkit.horovod_build.__main__ import read_stamp

# Beside the variables that travel to the ranks: how MPI, the frameworks and Slurm were told to work.
_SHOWN = (
    *("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_btl", "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_pml"),
    *("OMPI_MCA_mpi_yield_when_idle", "OMPI_MCA_oob_tcp_if_include", "UCX_TLS", "UCX_NET_DEVICES", "FI_PROVIDER"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "TF_FORCE_GPU_ALLOW_GROWTH", "PYTORCH_CUDA_ALLOC_CONF"),
    *("XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS", "MKL_NUM_THREADS", "LD_PRELOAD", "PYTHONHASHSEED"),
    *("SLURM_NTASKS", "SLURM_NNODES", "SLURM_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_MPI_TYPE"),
    *("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_PER_NODE", "SLURM_GPU_BIND"),
)
_HOMES = re.compile(r"(/home|/Users)/[^/:\s]+")
_LOGINS = re.compile(r"://[^/@\s]+@")
_SHORTEST_NAME = 3  # letters of a user's name that are looked for within words of other meaning


def add_to(commands: Any) -> None:
    """Add the command `env` to what `argparse.ArgumentParser.add_subparsers` gave."""
    parser = commands.add_parser("env", help="print what belongs in a bug report, without secrets")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(function=_env)


def report(environ: Mapping[str, str]) -> dict[str, str]:
    """What is installed, what it was built from, and how this machine and its variables are.

    Args:
        environ: the variables.
    """
    facts = probe.facts(os.getcwd())
    found = {"hvdkit": _toolkit(facts), "python": facts["python"][0]}
    found |= {name: each[0] if each else "not installed" for name, each in facts["packages"].items()}
    found |= {f"horovod built for {name}": version for name, version in facts["built_for"].items()}
    found |= {f"horovod built with {name}": text for name, text in read_stamp().items() if text and name != "recipe"}
    path, says = facts["mpirun"] or ("", "none")
    found["mpirun"] = f"{(says.splitlines() or [''])[0]} {path}".strip()
    count, usable = facts["cores"]
    found |= {
        "system": f"{_distribution()}; {platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "cores": f"{count}" + ("" if usable == count else f", of which a quota allows {usable}") + f"; {_processor()}",
        "memory": amount(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "/dev/shm": amount(facts["shm"][1]) + " free" if facts["shm"] else "none",
    }
    found |= _gpus(facts)
    found |= {f"${name}": value for name, value in _variables(environ).items()}
    return {name: one_line(without_names(value, environ), 2000) for name, value in found.items()}


def without_names(text: str, environ: Mapping[str, str]) -> str:
    """A text without this user's home directory and name, others' home directories, and logins in addresses."""
    home = environ.get("HOME", "").rstrip("/")
    if home:
        text = re.sub(rf"{re.escape(home)}(?=[/:\s]|$)", "~", text)
    text = _LOGINS.sub("://…@", _HOMES.sub(r"\1/…", text))
    try:
        user = environ.get("USER") or environ.get("LOGNAME") or getpass.getuser()
    except (KeyError, OSError):
        return text
    if len(user) < _SHORTEST_NAME or user == "root":
        return text
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "<user>", text)


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    names = [*launch.travelling((), environ, {}), *(name for name in _SHOWN if name in environ)]
    return {name: environ[name] for name in names if not launch.SECRET.search(name)}


def _gpus(facts: Mapping[str, Any]) -> dict[str, str]:
    """Driver, GPUs, CUDA and NCCL; {} on a machine without any."""
    seen = gpus.read(facts)
    if seen is None:
        return {}
    serves = f"{seen.driver or 'of unknown version'}, serves CUDA {seen.serves[0]}.{seen.serves[1]}"
    return {
        "GPU driver": serves if seen.error is None else f"{serves}, error {seen.error[0]}: {seen.error[1]}",
        "GPUs": seen.described() or f"none visible, of {seen.on_bus} on the PCI bus",
        "CUDA": ", ".join(seen.runtimes) or "of no package",
        "NCCL": seen.nccl or "not found",
        "horovod with NCCL for": ", ".join(facts["gpu_build"]) or "nothing",
        "NCCL network": nccl.check(seen.network, "", None).found,
    }


def _toolkit(facts: Mapping[str, Any]) -> str:
    version = (probe.package("toolkit", ("hvdkit",)) or ["of unknown version"])[0]
    return f"{version}, source files {facts['toolkit'][0]}" if facts["toolkit"] else version


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        return platform.machine()
    return found[1] if found else platform.machine()


def _env(options: argparse.Namespace) -> int:
    found = report(os.environ)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))
    return 0

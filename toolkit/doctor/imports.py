"""Import one framework, and Horovod for it, in a process of its own: `python -m toolkit.doctor.imports torch`."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import sys
import time
from typing import Any

MARK = "hvdkit-imports "
_LONGEST_VERSION = 8192  # bytes; MPI_MAX_LIBRARY_VERSION_STRING of MPICH, the longest


def found(what: str) -> dict[str, Any]:
    """What importing shows; an import that fails has its reason in place of its version.

    Args:
        what: torch, tensorflow or mpi4py. keras comes with its backend, TensorFlow or else torch.
    """
    if what == "mpi4py":
        return {"mpi4py": _tried(_mpi4py), **_mpi()}
    answer = {what: _tried(lambda: _imported(what))}
    if answer[what]["ok"]:
        answer[f"horovod.{what}"] = _tried(lambda: _imported(f"horovod.{what}", "horovod"))
        answer |= _mpi()
    if os.environ["KERAS_BACKEND"] == what:
        answer["keras"] = _tried(lambda: _imported("keras"))
    return answer


def _tried(one: Any) -> dict[str, Any]:
    began = time.monotonic()
    try:
        version = one()
    except BaseException as error:  # Keras ends the process where its backend is not there
        return {"ok": False, "found": f"{type(error).__name__}: {error}"}
    return {"ok": True, "found": version, "seconds": time.monotonic() - began}


def _imported(name: str, version_of: str = "") -> str:
    importlib.import_module(name)
    return str(getattr(sys.modules[version_of or name], "__version__", "of unknown version"))


def _mpi4py() -> str:
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    MPI.Get_library_version()
    return str(mpi4py.__version__)


def _mpi() -> dict[str, Any]:
    """Path of the libmpi that this process has loaded, and what it says of itself; nothing where there is none."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        paths = re.findall(r"(/\S*/libmpi(?:ch)?\.so\S*)$", file.read(), re.MULTILINE)
    if not paths:
        return {}
    text, length = ctypes.create_string_buffer(_LONGEST_VERSION), ctypes.c_int()
    ctypes.CDLL(paths[0]).MPI_Get_library_version(text, ctypes.byref(length))  # needs no MPI_Init
    return {"mpi": [paths[0], text.value.decode(errors="replace")]}


if __name__ == "__main__":
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]  # a recipe does not look for modules in its working directory
    print(MARK + json.dumps(found(sys.argv[1])), flush=True)

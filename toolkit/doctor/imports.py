"""Import one framework, and Horovod for it, in a process of its own: `python -m toolkit.doctor.imports torch`."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

MARK = "hvdkit-imports "
_TERMS = 1000  # of the sum that a GPU is tried with
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
        answer |= {**_mpi(), "cuda": _cuda(what)}
        if answer[f"horovod.{what}"]["ok"]:
            answer |= _nccl(what)
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
    paths = _loaded(r"libmpi(?:ch)?\.so\S*")
    if not paths:
        return {}
    text, length = ctypes.create_string_buffer(_LONGEST_VERSION), ctypes.c_int()
    ctypes.CDLL(paths[0]).MPI_Get_library_version(text, ctypes.byref(length))  # needs no MPI_Init
    return {"mpi": [paths[0], text.value.decode(errors="replace")]}


def _loaded(name: str) -> list[str]:
    """Paths of the libraries that this process has loaded, by a pattern for their name."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return list(dict.fromkeys(re.findall(rf"(/\S*/{name})$", file.read(), re.MULTILINE)))


def _nccl(what: str) -> dict[str, Any]:
    """NCCL's version that Horovod was built with, and those of the libraries that are loaded; nothing without NCCL."""
    built, loaded = sys.modules[f"horovod.{what}"].nccl_built(), {}
    if not built:
        return {}
    for path in _loaded(r"libnccl\.so\S*"):
        number = ctypes.c_int()
        ctypes.CDLL(path).ncclGetVersion(ctypes.byref(number))
        loaded[path] = number.value
    return {"nccl": {"built": built, "loaded": loaded}}


def _cuda(what: str) -> dict[str, Any]:
    """The CUDA version that a framework was built for, None without; GPUs that it sees; what is wrong with them."""
    version, gpus, wrong = None, 0, []
    try:
        version, gpus, summed = {"torch": _torch, "tensorflow": _tensorflow}[what]()
        wrong = [f"GPU {n}: a sum is wrong" for n in range(gpus) if summed(n) != _TERMS * (_TERMS - 1) // 2]
    except Exception as error:
        wrong = [f"{type(error).__name__}: {error}"]
    return {"version": version, "gpus": gpus, "wrong": "; ".join(wrong)}


def _torch() -> tuple[str | None, int, Callable[[int], int]]:
    import torch

    def summed(number: int) -> int:
        return int(torch.arange(_TERMS, device=f"cuda:{number}").sum())

    return torch.version.cuda, torch.cuda.device_count(), summed


def _tensorflow() -> tuple[str | None, int, Callable[[int], int]]:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)  # else all of it is taken

    def summed(number: int) -> int:
        with tf.device(f"/GPU:{number}"):
            return int(tf.reduce_sum(tf.range(_TERMS)))

    return tf.sysconfig.get_build_info().get("cuda_version"), len(gpus), summed


if __name__ == "__main__":
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]  # a recipe does not look for modules in its working directory
    print(MARK + json.dumps(found(sys.argv[1])), flush=True)

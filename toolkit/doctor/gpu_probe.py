"""What one host tells of its NVIDIA GPUs, a line of JSON: `python toolkit/doctor/gpu_probe.py`.

A program of its own, as a driver that is out of order may hang or crash. It runs as a file, beside another toolkit too:
so it takes nothing but the standard library, from Python 3.8 on. It starts nothing on a device. Sources: CUDA Driver
API (cuda.h), NVML (nvml.h), NCCL (nccl.h and its documentation of environment variables).
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib.metadata
import json
import os
import re
import resource

_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI's vendor, and the beginning of the class of what computes or draws
_COMPUTE_MODE = 20  # cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu11")
_NCCLS = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")
# Which network NCCL takes; as variables, or as lines of its files, which are read first.
_NETWORK = ("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_NET", "NCCL_NET_PLUGIN")


def facts(system: str = "/sys") -> dict:
    """All of them; {} on a host with neither NVIDIA's hardware nor its driver.

    Args:
        system: where the kernel tells of devices.
    """
    on_bus = sum(_read(f"{place}/vendor") == _NVIDIA for place in _displays(system))
    try:
        driver, why = ctypes.CDLL("libcuda.so.1"), ""
    except OSError as error:
        if not on_bus:
            return {}
        driver, why = None, str(error)
    return {
        "on_bus": on_bus,
        "driver": _driver_version(),
        **(_without(0, why) if driver is None else _of_driver(driver)),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "runtimes": _versions(_RUNTIMES),
        "nccl": (_versions(_NCCLS) or _own_nccl())[:1],
        "ports": _ports(system),
        "verbs": _loads("libibverbs.so.1"),
        "plugin": _loads("libnccl-net.so"),
        "lockable": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "settings": _settings(("/etc/nccl.conf", os.environ.get("NCCL_CONF_FILE", "~/.nccl.conf"))),
    }


def _displays(system: str) -> list:
    found = glob.glob(f"{system}/bus/pci/devices/*")
    return [place for place in found if _read(f"{place}/class").startswith(_DISPLAY)]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _without(error: int, words: str, serves: int = 0) -> dict:
    return {"serves": serves, "error": [error, words], "gpus": [], "apart": []}


def _of_driver(driver: ctypes.CDLL) -> dict:
    """The CUDA version that it serves, what it answers when it is begun, its GPUs, and pairs without peer access."""
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if failed:
        return _without(failed, _error_name(driver, failed), version.value)
    devices = [_device(driver, number) for number in range(count.value)]
    pairs = [(one, other) for one in range(count.value) for other in range(one + 1, count.value)]
    apart = [pair for pair in pairs if not _reaches(driver, devices[pair[0]], devices[pair[1]])]
    return {"serves": version.value, "error": None, "gpus": [_gpu(driver, each) for each in devices], "apart": apart}


def _error_name(driver: ctypes.CDLL, number: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(number, ctypes.byref(text))
    return (text.value or b"").decode(errors="replace") or f"error {number}"


def _device(driver: ctypes.CDLL, number: int) -> int:
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), number)
    return device.value


def _gpu(driver: ctypes.CDLL, device: int) -> dict:
    name, memory, mode = ctypes.create_string_buffer(96), ctypes.c_size_t(), ctypes.c_int()
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(mode), _COMPUTE_MODE, device)
    return {"name": name.value.decode(errors="replace"), "memory": memory.value, "mode": mode.value}


def _reaches(driver: ctypes.CDLL, one: int, other: int) -> bool:
    can = ctypes.c_int()
    return not driver.cuDeviceCanAccessPeer(ctypes.byref(can), one, other) and bool(can.value)


def _driver_version() -> str:
    """By NVML, or as the kernel's module tells it; "" where neither does."""
    with contextlib.suppress(OSError, AttributeError):
        library, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
        if not library.nvmlInit_v2() and not library.nvmlSystemGetDriverVersion(text, len(text)):
            return text.value.decode(errors="replace")
    found = re.search(r"Module.*?\s(\d+\.\d+[.\d]*)", _read("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def _versions(distributions: tuple) -> list:
    found = []
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.version(name))
    return found


def _own_nccl() -> list:
    """The version of the NCCL that the loader finds; [] where there is none."""
    with contextlib.suppress(OSError, AttributeError):
        number = ctypes.c_int()
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
        return [f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"]
    return []


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _ports(system: str) -> list:
    """Ports of RDMA devices that are up, as `["mlx5_0", "InfiniBand", "400 Gb/sec (4X NDR)"]`."""
    found = []
    for port in sorted(glob.glob(f"{system}/class/infiniband/*/ports/*")):
        if _read(f"{port}/state").startswith("4"):  # ACTIVE
            found.append([port.split("/")[-3], _read(f"{port}/link_layer"), _read(f"{port}/rate")])
    return found


def _settings(files: tuple) -> dict:
    """NCCL's settings that choose its network: of a variable, or else of the last of its files that has it."""
    found = {}
    for path in files:
        for line in _read(os.path.expanduser(path)).splitlines():
            name, _, value = line.strip().partition("=")
            found[name.strip()] = value.strip()
    found.update(os.environ)
    return {name: found[name] for name in _NETWORK if name in found}


if __name__ == "__main__":
    print(json.dumps(facts()), flush=True)

"""Which GPU a worker computes on, decided alike for every framework."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.errors import UsageError
from toolkit.world import World

DEVICES = ("auto", "cpu", "gpu")

#: An environment variable: one of `DEVICES`, taken in place of "auto".
VARIABLE = "HVDKIT_DEVICE"


@dataclass(frozen=True)
class Place:
    """What a worker computes on.

    Attributes:
        worker: its name.
        host: that it is on.
        gpu: the UUID of its GPU, or of its part of one (MIG); "" for the CPU.
        bus: the GPU's place on the host's PCI bus, which parts of a GPU have alike.
    """

    worker: str
    host: str
    gpu: str = ""
    bus: str = ""


def choose(asked: str, world: World, visible: int) -> int | None:
    """The number of this worker's GPU among those that its framework sees; None: the CPU.

    Args:
        asked: one of `DEVICES`; "auto" takes a GPU where there is one.
        world: this worker.
        visible: GPUs that the framework sees here.

    Raises:
        UsageError: "gpu" where none is visible, or a word that there is not.
    """
    if asked not in DEVICES:
        raise UsageError(f"the device is {asked!r}: give one of {', '.join(DEVICES)}.")
    if asked == "cpu" or (asked == "auto" and visible == 0):
        return None
    if visible == 0:
        raise UsageError(
            f"--device gpu, and {world.name} sees no GPU: look at `hvdkit doctor`, CUDA_VISIBLE_DEVICES and whether "
            "the framework is a build for CUDA, or give --device cpu."
        )
    return world.local_rank % visible


def crowded(places: Sequence[Place]) -> str | None:
    """A host where workers would have a GPU together, and how many of each; None: there is none.

    Args:
        places: those of workers on one or more hosts.
    """
    for host in dict.fromkeys(place.host for place in places):
        gpus = Counter(place.gpu for place in places if place.host == host and place.gpu)
        if max(gpus.values(), default=0) > 1:
            return f"{sum(gpus.values())} workers on {host} and {len(gpus)} GPU(s)"
    return None


def why_not_auto(places: Sequence[Place], with_nccl: bool) -> str | None:
    """Why workers that may choose leave the GPUs alone, and what to do; None: they take them, or there are none.

    Args:
        places: every worker's, as far as they are known.
        with_nccl: whether Horovod has NCCL, which adds up gradients on GPUs.
    """
    if not any(place.gpu for place in places):
        return None
    if not with_nccl:
        return "Horovod was built without NCCL: `make setup GPU=1`, or do without it by --device gpu"
    found = crowded(places)
    return (
        f"{found}: start as many there as it has GPUs, or let workers share them with --share-gpus" if found else None
    )


def check(places: Sequence[Place], share: bool) -> str | None:
    """Why NCCL can't add up what these workers have, told every worker's place; the same on all of them.

    Args:
        places: every worker's, in rank order.
        share: whether workers may have a GPU together.

    Returns:
        None where each has a GPU of its own, else what is otherwise.

    Raises:
        UsageError: some workers have a GPU and others none; or two share one, and were not told to.
    """
    without = [place for place in places if not place.gpu]
    if without and len(without) < len(places):
        raise UsageError(
            f"{without[0].worker} has no GPU of its own, and other workers have: mend that host, start no more workers "
            "there than it has GPUs, or give --device cpu."
        )
    if without:
        return "the workers are on CPUs"
    if found := crowded(places):
        if not share:
            raise UsageError(
                f"{found}: start as many there as it has GPUs, or let workers share them with --share-gpus."
            )
        return "workers share a GPU, which NCCL refuses"
    if len({(place.host, place.bus) for place in places}) < len(places):
        return "workers have parts of the same GPU (MIG), which NCCL refuses"
    return None


def identity(number: int) -> tuple[str, str]:
    """The UUID of a GPU and its place on the PCI bus, by its number among those that this process sees.

    Asked of the driver, as not every framework tells it (CUDA Driver API: cuDeviceGetUuid_v2, cuDeviceGetPCIBusId).
    Nothing is started on the device.

    Raises:
        UsageError: the driver does not tell.
    """
    device, found, bus = ctypes.c_int(), (ctypes.c_ubyte * 16)(), ctypes.create_string_buffer(32)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), number)
        failed = failed or driver.cuDeviceGetUuid_v2(ctypes.byref(found), device)
        failed = failed or driver.cuDeviceGetPCIBusId(bus, len(bus), device)
    except (OSError, AttributeError) as error:
        raise UsageError(
            f"CUDA's driver can't be asked for GPU {number} ({error}): mend it, or give --device cpu."
        ) from None
    if failed:
        raise UsageError(
            f"CUDA's driver does not tell of GPU {number} (error {failed}): mend it, or give --device cpu."
        )
    return bytes(found).hex(), bus.value.decode()


class _Utilization(ctypes.Structure):
    """NVML's nvmlUtilization_t: percent of the last moments, a sixth of a second to one, in which each was in use."""

    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


def utilization(gpu: str) -> float | None:
    """The percent of the last moments in which a GPU computed anything, whoever had it compute.

    Args:
        gpu: its UUID, as `identity` tells it.

    Returns:
        0 … 100; None where NVML is not there or does not tell, as of a part of a GPU (MIG).
    """
    library, handle = _nvml(gpu)
    found = _Utilization()
    if library is None or library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(found)):
        return None
    return float(found.gpu)


@functools.cache
def _nvml(gpu: str) -> tuple[Any, ctypes.c_void_p]:
    """NVML, begun, and its handle of a GPU; None in place of NVML where it can't be asked of that."""
    handle = ctypes.c_void_p()
    name = f"GPU-{gpu[:8]}-{gpu[8:12]}-{gpu[12:16]}-{gpu[16:20]}-{gpu[20:]}".encode()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle))
    except (OSError, AttributeError):
        return None, handle
    return (None if failed else library), handle

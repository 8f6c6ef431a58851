"""Which GPU a worker computes on, decided alike for every framework."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.errors import UsageError
from toolkit.world import World

DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True)
class Place:
    """What a worker computes on: `host`, and the UUID of its GPU; "" for the CPU."""

    worker: str
    host: str
    gpu: str


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
            f"--device gpu, and {world.name} sees no GPU: look at `nvidia-smi`, CUDA_VISIBLE_DEVICES and whether the "
            "framework is a build for CUDA, or give --device cpu."
        )
    return world.local_rank % visible


def check(places: Sequence[Place], share: bool) -> bool:
    """Whether each worker has a GPU of its own, told every worker's place; the same on all of them.

    Args:
        places: every worker's, in rank order.
        share: whether workers may have a GPU together.

    Returns:
        False where two share one, or all are on CPUs.

    Raises:
        UsageError: some workers have a GPU and others none; or two share one, and were not told to.
    """
    without = [place for place in places if not place.gpu]
    if without and len(without) < len(places):
        raise UsageError(
            f"{without[0].worker} found no GPU, and other workers have: mend that host, or give --device cpu."
        )
    for host in dict.fromkeys(place.host for place in places):
        gpus = Counter(place.gpu for place in places if place.host == host and place.gpu)
        if gpus and max(gpus.values()) > 1:
            if not share:
                raise UsageError(
                    f"{sum(gpus.values())} workers on {host} and {len(gpus)} GPU(s): start as many there as "
                    "it has GPUs, or let workers share them with --share-gpus."
                )
            return False
    return not without


def uuid(number: int) -> str:
    """The UUID of a GPU, by its number among those that CUDA_VISIBLE_DEVICES leaves to this process.

    Asked of the driver, as not every framework tells it (CUDA Driver API: cuDeviceGetUuid_v2); of a part of a
    GPU (MIG) it is the part's. Nothing is started on the device.
    """
    device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), number)
        failed = failed or driver.cuDeviceGetUuid_v2(ctypes.byref(found), device)
    except (OSError, AttributeError) as error:
        raise UsageError(
            f"CUDA's driver can't be asked for GPU {number} ({error}): mend it, or give --device cpu."
        ) from None
    if failed:
        raise UsageError(
            f"CUDA's driver does not tell of GPU {number} (error {failed}): mend it, or give --device cpu."
        )
    return bytes(found).hex()

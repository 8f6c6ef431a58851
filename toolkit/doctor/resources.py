"""A host's cores, shared memory and disk against what is planned for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.doctor.checks import Check

MIB = 1 << 20
_SHM_PER_RANK = 16 * MIB  # Open MPI puts 4 MiB of each rank there, torch's DataLoader workers each batch
_LEAST_SHM = 128 * MIB  # a container has 64 unless told otherwise
_LEAST_DISK = 1 << 30  # for checkpoints


def resources(facts: Mapping[str, Any], host: str, ranks: int | None) -> list[Check]:
    """Cores, /dev/shm and the working directory's disk.

    Args:
        facts: of `probe.facts`.
        host: its name in the checks.
        ranks: planned there; None: not known.
    """
    return [_cores(facts, host, ranks), _shm(facts, host, ranks), _disk(facts, host)]


def amount(size: float) -> str:
    """Bytes in a unit that suits them."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:.0f} {units[0]}"


def _cores(facts: Mapping[str, Any], host: str, ranks: int | None) -> Check:
    count, usable = facts["cores"]
    found = f"{count} core{'' if count == 1 else 's'}"
    if usable < count:
        found, count = f"{found}, of which the container's quota allows {usable}", usable
    if ranks is None:
        return Check("cores", host, True, found)
    fix = "" if ranks <= count else f"plan {count} there: by -np or slots={count}; more work too, each slower"
    return Check("cores", host, ranks <= count, f"{found} for {ranks} rank{'' if ranks == 1 else 's'}", fix)


def _shm(facts: Mapping[str, Any], host: str, ranks: int | None) -> Check:
    if facts["shm"] is None:
        return Check("/dev/shm", host, False, "is not there", "mount it: `mount -t tmpfs tmpfs /dev/shm`")
    size, free = facts["shm"]
    needed = max(_LEAST_SHM, _SHM_PER_RANK * (ranks or 1))
    ok = free >= needed
    fix = f"give it {amount(needed)} or more: `docker run --shm-size=1g`, an emptyDir of medium Memory in Kubernetes, "
    fix += f"`mount -o remount,size=1G /dev/shm`, or remove old files there; needed is {amount(needed)}"
    return Check("/dev/shm", host, ok, f"{amount(free)} free of {amount(size)}", "" if ok else fix)


def _disk(facts: Mapping[str, Any], host: str) -> Check:
    place = facts["directory"]
    if place["space"] is None:
        return Check("working directory", host, False, "is not there", "mount it there at the same path, or make it")
    size, free = place["space"]
    found = f"{amount(free)} free of {amount(size)}"
    if not place["writable"]:
        fix = "run from a directory that you may write to, or give the recipes --output elsewhere"
        return Check("working directory", host, False, f"can't be written to; {found}", fix)
    fix = f"make room for checkpoints, {amount(_LEAST_DISK)} or more, or give the recipes --output elsewhere"
    return Check("working directory", host, free >= _LEAST_DISK, found, "" if free >= _LEAST_DISK else fix)

"""The GPUs of a host, their driver, and the network that NCCL takes there: pure functions of `gpu_probe`'s facts.

A host with neither NVIDIA's hardware nor its driver has no such check. Where Horovod was built without NCCL nothing
here is wrong, as training on CPUs needs none of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.doctor import nccl
from toolkit.doctor.checks import Check
from toolkit.doctor.nccl import Network
from toolkit.doctor.resources import amount

NEEDED = ("GPU driver", "NCCL network", "GPUs alike")  # the checks without which NCCL can't add up
SETUP = "make setup GPU=1"
_NO_LIBRARY, _NO_DEVICE = 0, 100  # the first is ours, for a library that can't be loaded; cuda.h: CUDA_ERROR_NO_DEVICE
_PROHIBITED, _EXCLUSIVE = 2, 3  # cuda.h: CUcomputemode
_OLDEST_DRIVER = {11: "450", 12: "525", 13: "580"}  # NVIDIA: CUDA compatibility, table of minor versions
_LOOK = "look at `nvidia-smi` and `dmesg | grep -i -e nvrm -e xid`; a restart of the host may be needed"
_FIXES = {  # CUresult of cuda.h
    _NO_LIBRARY: "install NVIDIA's driver; a container gets the host's by `docker run --gpus all`, a pod by a limit of "
    "nvidia.com/gpu",
    34: "that libcuda.so.1 is the CUDA toolkit's stub, for linking alone: take its directory out of LD_LIBRARY_PATH",
    802: "the GPUs' switches are not set up: `systemctl start nvidia-fabricmanager`, of the driver's version",
    803: "library and kernel module of the driver are of different versions: restart the host after an upgrade; in a "
    "container, take a libcuda of its own out of the image",
    804: "the image brings CUDA's compatibility package, which this GPU can't use: take it out of LD_LIBRARY_PATH",
    999: "load the module nvidia_uvm (`nvidia-modprobe -u -c=0`; in a container /dev/nvidia-uvm); else " + _LOOK,
}

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Gpus:
    """What `gpu_probe` told of one host.

    Attributes:
        on_bus: NVIDIA's devices on the PCI bus.
        driver: its version, or "".
        serves: the newest CUDA that the driver serves, as (13, 0).
        error: the driver's answer where it can't be used, a number of cuda.h and words; else None.
        names: of the GPUs that this process sees.
        memory: bytes of each.
        modes: compute mode of each.
        apart: pairs of them without peer access.
        visible: CUDA_VISIBLE_DEVICES, where it is set.
        runtimes: versions of CUDA that the environment's packages brought.
        nccl: NCCL's version, or "".
        network: what NCCL's choice of one hangs on.
    """

    on_bus: int
    driver: str
    serves: tuple[int, int]
    error: tuple[int, str] | None
    names: tuple[str, ...]
    memory: tuple[int, ...]
    modes: tuple[int, ...]
    apart: tuple[tuple[int, int], ...]
    visible: str | None
    runtimes: tuple[str, ...]
    nccl: str
    network: Network

    def described(self) -> str:
        """How many GPUs of which kind, with their memory."""
        counts = Counter(zip(self.names, self.memory, strict=True))
        return ", ".join(f"{count} × {name} of {amount(memory)}" for (name, memory), count in counts.items())


def read(facts: Facts) -> Gpus | None:
    """A host's GPUs, from `probe.facts`; None where it has neither hardware nor driver.

    Raises:
        Exception: the facts are of another form.
    """
    told = facts["gpus"]
    if not told:
        return None
    if "failure" in told:
        network = Network((), (), False, False, -1, {})
        return Gpus(0, "", (0, 0), (-1, str(told["failure"])), (), (), (), (), None, (), "", network)
    error, visible, serves = told["error"], told["visible"], int(told["serves"])
    return Gpus(
        on_bus=int(told["on_bus"]),
        driver=str(told["driver"]),
        serves=(serves // 1000, serves % 1000 // 10),
        error=None if error is None else (int(error[0]), str(error[1])),
        names=tuple(str(gpu["name"]) for gpu in told["gpus"]),
        memory=tuple(int(gpu["memory"]) for gpu in told["gpus"]),
        modes=tuple(int(gpu["mode"]) for gpu in told["gpus"]),
        apart=tuple((int(one), int(other)) for one, other in told["apart"]),
        visible=None if visible is None else str(visible),
        runtimes=tuple(map(str, told["runtimes"])),
        nccl=str(next(iter(told["nccl"]), "")),
        network=Network(
            interfaces=tuple(name for name, addresses in facts["interfaces"].items() if addresses),
            ports=tuple((str(device), str(layer), str(rate)) for device, layer, rate in told["ports"]),
            verbs=bool(told["verbs"]),
            plugin=bool(told["plugin"]),
            lockable=int(told["lockable"]),
            settings={str(name): str(value) for name, value in told["settings"].items()},
        ),
    )


def of_host(facts: Facts, host: str, ranks: int | None, interface: str | None = None) -> list[Check]:
    """Driver, GPUs, peer access and NCCL's network of a host.

    Args:
        facts: of `probe.facts`.
        host: its name in the checks; "": this machine, alone.
        ranks: planned there; None: not known.
        interface: that the user named, or None.

    Raises:
        Exception: the facts are of another form.
    """
    seen, built = read(facts), bool(facts["gpu_build"])
    if seen is None:
        return [Check("GPUs", host, None, "none, nor a driver: training there is on the CPU")] if built else []
    checks = [_driver(seen, host)]
    if checks[0].ok:
        checks.append(_gpus(seen, host, ranks, built))
    if seen.names and built:
        checks += [_peers(seen, host)] if len(seen.names) > 1 else []
        checks.append(nccl.check(seen.network, host, interface))
    if built:
        return checks
    # Whoever trains on CPUs is not told that something is wrong.
    return [dataclasses.replace(check, ok=None) if check.ok is False else check for check in checks]


def _driver(seen: Gpus, host: str) -> Check:
    version = f"{seen.driver or 'of unknown version'}, which serves CUDA {seen.serves[0]}.{seen.serves[1]}"
    if seen.error is not None and seen.error[0] == _NO_LIBRARY:
        found = f"none, and {seen.on_bus} of NVIDIA's GPUs on the PCI bus ({seen.error[1]})"
        return Check("GPU driver", host, False, found, _FIXES[_NO_LIBRARY])
    if seen.error is not None and seen.error[0] != _NO_DEVICE:
        number, words = seen.error
        found = f"{version}, can't be used: {words} ({number})" if number > 0 else f"can't be asked: {words}"
        return Check("GPU driver", host, False, found, _FIXES.get(number, _LOOK))
    newest = max(seen.runtimes, key=_major, default="")
    if _major(newest) > seen.serves[0]:
        oldest = _OLDEST_DRIVER.get(_major(newest), "that serves it")
        fix = f"install driver {oldest} or later there, or here a framework that was built for CUDA {seen.serves[0]}"
        return Check("GPU driver", host, False, f"{version}; the environment's CUDA is {newest}", fix)
    return Check("GPU driver", host, True, version)


def _major(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() else 0


def _gpus(seen: Gpus, host: str, ranks: int | None, built: bool) -> Check:
    count, found = len(seen.names), seen.described()
    if not count:
        if seen.visible is not None:
            found = f"CUDA_VISIBLE_DEVICES is {seen.visible!r}, which leaves none of {seen.on_bus}"
            return Check("GPUs", host, False, found, "unset it, or name GPUs that `nvidia-smi -L` lists")
        fix = "look at `nvidia-smi -L`; ask for them: Slurm `--gpus-per-node`, `docker run --gpus all`, nvidia.com/gpu"
        return Check("GPUs", host, False, f"none is visible here, of {seen.on_bus} on the PCI bus", fix)
    if closed := [str(number) for number, mode in enumerate(seen.modes) if mode == _PROHIBITED]:
        fix = f"`nvidia-smi -i {','.join(closed)} -c DEFAULT`, as root"
        return Check("GPUs", host, False, f"{found}; compute mode of {', '.join(closed)}: Prohibited", fix)
    if ranks is None:
        return Check("GPUs", host, True, found, "" if built else f"to train on them: {SETUP}")
    found = f"{found} for {ranks} rank{'' if ranks == 1 else 's'}"
    if not built:
        return Check("GPUs", host, True, found, f"to train on them: {SETUP}")
    if ranks <= count:
        return Check("GPUs", host, True, found)
    share = "let ranks share them with --share-gpus"
    if _EXCLUSIVE in seen.modes:
        share += ", once `nvidia-smi -c DEFAULT` lets programs share one"
    return Check("GPUs", host, False, found, f"plan {count} there, by -np or slots={count}; or {share}")


def _peers(seen: Gpus, host: str) -> Check:
    pairs = len(seen.names) * (len(seen.names) - 1) // 2
    if not seen.apart:
        return Check("peer access", host, True, "each GPU reaches every other's memory")
    shown = ", ".join(f"{one}-{other}" for one, other in seen.apart[:4]) + (" …" if len(seen.apart) > 4 else "")
    hint = "NCCL goes through the host's memory there, which is slower: see `nvidia-smi topo -m`; "
    hint += "an IOMMU, PCI's ACS or a virtual machine may be in the way"
    return Check("peer access", host, None, f"not between {len(seen.apart)} of {pairs} pairs of GPUs: {shown}", hint)


def alike(hosts: Mapping[str, Facts], interface: str | None) -> list[Check]:
    """Whether hosts have the same driver, NCCL, GPUs and kind of network; [] where none has GPUs or Horovod no NCCL.

    Args:
        hosts: facts of several hosts by name.
        interface: that the user named, or None.

    Raises:
        Exception: facts are of another form.
    """
    if not any(facts["gpu_build"] for facts in hosts.values()):
        return []
    all_seen = {host: read(facts) for host, facts in hosts.items()}
    able = {host: seen for host, seen in all_seen.items() if seen is not None and seen.names}
    if not able:
        return []
    usual = [_usual([_traits(seen, interface)[n] for seen in able.values()]) for n in range(len(_TRAITS))]
    checks = []
    for host in hosts:
        if host not in able:
            fix = "mend that host, take it out of the hostfile, or train everywhere with --device cpu"
            checks.append(Check("GPUs alike", host, False, "none that can be used, and other hosts have", fix))
        else:
            checks.append(_against(_traits(able[host], interface), usual, host))
    return checks


# What is compared, whether a difference keeps a job from running, and what to do.
_TRAITS = (
    ("NCCL", True, "install the same NCCL on every host: it refuses another version"),
    ("network", True, "let NCCL take one on all: NCCL_IB_DISABLE=1 or NCCL_NET=Socket for all, or mend that host's"),
    ("driver", False, "bring the drivers to one version when you can; jobs run"),
    ("GPUs", False, "all wait for the slowest GPU in each step; give hosts of one kind to a job where there are"),
)


def _traits(seen: Gpus, interface: str | None) -> list[str]:
    return [seen.nccl, nccl.kind(seen.network, interface), seen.driver, seen.described()]


def _usual(found: Sequence[str]) -> str:
    return Counter(found).most_common(1)[0][0]


def _against(traits: Sequence[str], usual: Sequence[str], host: str) -> Check:
    other = [each for each in zip(_TRAITS, traits, usual, strict=True) if each[1] != each[2]]
    if not other:
        told = [f"{name} {text}" for (name, *_), text in zip(_TRAITS, traits, strict=True) if text]
        return Check("GPUs alike", host, True, ", ".join(told))
    _, fatal, fix = max((what for what, _, _ in other), key=lambda what: what[1])
    found = "; ".join(f"{what[0]} {its or 'none'}, most others {theirs or 'none'}" for what, its, theirs in other)
    return Check("GPUs alike", host, False if fatal else None, found, fix)

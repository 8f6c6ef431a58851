"""Which network NCCL takes between hosts, by the rules of its own source (src/misc/socket.cc, src/transport/net_ib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.doctor.checks import Check

_LOCAL = ("docker", "lo", "virbr")  # taken in this order where there is nothing else
_LEAST_LOCKED = 1 << 30  # bytes that InfiniBand's devices may have to reach; less ends with "ibv_reg_mr failed"


@dataclass(frozen=True)
class Network:
    """What NCCL's choice hangs on.

    Attributes:
        interfaces: names of those that are up and have an address, without the loopback one.
        ports: of RDMA devices that are up: device, "InfiniBand" or "Ethernet", rate.
        verbs: whether libibverbs.so.1, which NCCL needs for them, can be loaded.
        plugin: whether there is a libnccl-net.so, which comes before both.
        lockable: bytes of memory that a process may lock; -1: any.
        settings: NCCL's own variables.
    """

    interfaces: tuple[str, ...]
    ports: tuple[tuple[str, str, str], ...]
    verbs: bool
    plugin: bool
    lockable: int
    settings: Mapping[str, str]


def sockets(names: Sequence[str], wanted: str) -> list[str]:
    """The interfaces that NCCL takes for sockets.

    Args:
        names: those that are up, without the loopback one.
        wanted: NCCL_SOCKET_IFNAME: beginnings of names, `=` for whole names, `^` for all but these; "": its own order.
    """
    if len(wanted) > 1:
        return _matching([*names, "lo"], wanted)
    for choice in ("ib", "^" + ",".join(_LOCAL), *_LOCAL):
        if found := _matching([*names, "lo"], choice):
            return found
    return []


def _matching(names: Sequence[str], wanted: str) -> list[str]:
    without, rest = wanted.startswith("^"), wanted.lstrip("^")
    exact, listed = rest.startswith("="), [part for part in rest.lstrip("=").split(",") if part]
    fits = {name: any(name == part if exact else name.startswith(part) for part in listed) for name in names}
    return [name for name in names if fits[name] != without]


def devices(network: Network) -> list[tuple[str, str, str]]:
    """The ports of RDMA devices that NCCL's settings leave to it, whether or not it can use them."""
    told = network.settings
    if told.get("NCCL_IB_DISABLE", "0") not in ("", "0") or told.get("NCCL_NET", "").lower() == "socket":
        return []
    wanted = told.get("NCCL_IB_HCA", "")
    if not wanted:
        return list(network.ports)
    plain = ",".join(part.partition(":")[0] for part in wanted.split(","))  # a port may be named too
    fitting = _matching([device for device, _, _ in network.ports], plain)
    return [port for port in network.ports if port[0] in fitting]


def kind(network: Network, interface: str | None) -> str:
    """In a word what NCCL takes, to compare hosts by."""
    if _plugin(network):
        return "plugin"
    if network.verbs and (ports := devices(network)):
        return "RoCE" if all(layer == "Ethernet" for _, layer, _ in ports) else "InfiniBand"
    return "sockets" if sockets(network.interfaces, _wanted(network, interface)) else "none"


def _plugin(network: Network) -> bool:
    return network.plugin and network.settings.get("NCCL_NET_PLUGIN") != "none" and "NCCL_NET" not in network.settings


def _wanted(network: Network, interface: str | None) -> str:
    return interface or network.settings.get("NCCL_SOCKET_IFNAME", "")  # as `hvdkit launch` sets it


def check(network: Network, name: str, interface: str | None) -> Check:
    """The check of a network.

    Args:
        network: what there is.
        name: in the check; "": this machine alone, where any interface serves.
        interface: that the user named, or None.
    """
    label, wanted = "NCCL network", _wanted(network, interface)
    taken = sockets(network.interfaces, wanted)
    if not taken:
        has = ", ".join(network.interfaces) or "none"
        fix = "name one that is up, by --interface, or unset NCCL_SOCKET_IFNAME"
        return Check(label, name, False, f"no interface of NCCL_SOCKET_IFNAME={wanted}: there is {has}", fix)
    over = ", ".join(taken)
    if name and not wanted and taken[0].startswith(_LOCAL):
        fix = "bring up an interface that other hosts reach, and name it with --interface"
        return Check(label, name, False, f"only {over}, which no other host reaches", fix)
    if _plugin(network):
        return Check(label, name, True, f"the plugin libnccl-net.so; NCCL's ranks meet over {over}")
    ports = devices(network)
    told = ", ".join(f"{device} ({layer}, {rate})" for device, layer, rate in ports)
    if ports and not network.verbs:
        hint = "Debian, Ubuntu: `apt install libibverbs1 ibverbs-providers`; in a container also /dev/infiniband"
        return Check(label, name, None, f"sockets over {over}; {told} is left out for want of libibverbs.so.1", hint)
    if ports and 0 <= network.lockable < _LEAST_LOCKED:
        hint = "let it be locked: `ulimit -l unlimited` (/etc/security/limits.conf), `docker run --ulimit memlock=-1`"
        return Check(label, name, None, f"{told}; but only {network.lockable >> 10} KiB of memory may be locked", hint)
    if ports:
        return Check(label, name, True, f"{told}; NCCL's ranks meet over {over}")
    if network.ports:
        unused = ", ".join(dict.fromkeys(device for device, _, _ in network.ports))
        hint = "unset NCCL_IB_DISABLE, NCCL_NET and NCCL_IB_HCA, if sockets were not wanted"
        return Check(label, name, True, f"sockets over {over}; NCCL's variables leave {unused} out", hint)
    return Check(label, name, True, f"sockets over {over}")

"""What another host has against what this one has, and what the hosts have in common: pure functions of facts."""

from __future__ import annotations

import contextlib
import ipaddress
from collections import Counter
from collections.abc import Mapping
from typing import Any

from toolkit.doctor.checks import Check

Facts = Mapping[str, Any]

MOST_SKEW = 1.0  # seconds


def same(here: Facts, there: Facts, host: str) -> list[Check]:
    """Python, packages, toolkit, MPI and data of a host against this machine's."""
    return [
        _python(here, there, host),
        _packages(here, there, host),
        _toolkit(here, there, host),
        _mpirun(here, there, host),
        _data(here, there, host),
    ]


def clock(ahead: float, uncertainty: float, host: str) -> Check:
    """A host's clock against this machine's.

    Args:
        ahead: seconds.
        uncertainty: seconds by which `ahead` may be off.
        host: its name.
    """
    if abs(ahead) + uncertainty <= MOST_SKEW:
        return Check("clock", host, True, f"within {max(0.001, abs(ahead) + uncertainty):.2g} s of this one's")
    if abs(ahead) - uncertainty <= MOST_SKEW:
        hint = "look at it by hand, `date` there and here: the way to the host is slow"
        return Check("clock", host, None, f"can't be told closer than ± {uncertainty:.2g} s", hint)
    found = f"{abs(ahead):.3g} s {'ahead of' if ahead > 0 else 'behind'} this one's (± {uncertainty:.2g} s)"
    fix = (
        "set it: `chronyc makestep`, and let NTP keep it; till then times of files and logs of several hosts can't be "
    )
    return Check("clock", host, False, found, f"{fix}compared, and tickets and certificates may be refused")


def _python(here: Facts, there: Facts, host: str) -> Check:
    (ours, path), (theirs, place) = here["python"], there["python"]
    if ours == theirs:
        return Check("python", host, True, f"{theirs} at {place}")
    fix = f"put the same environment at {path} on every host: a shared file system, or the same installation"
    return Check("python", host, False, f"{theirs} at {place}; here {ours}", fix)


def _packages(here: Facts, there: Facts, host: str) -> Check:
    differences, have = [], []
    for name, ours in here["packages"].items():
        theirs = there["packages"][name]
        if theirs == ours:
            have += [f"{name} {ours[0]}"] if ours else []
            continue
        told = [f"{each[0]} in {each[1]}" if each else "none" for each in (theirs, ours)]
        if ours and theirs:
            column = 0 if ours[0] != theirs[0] else 1
            told = [theirs[column], ours[column]]
        differences.append(f"{name} {told[0]}, here {told[1]}")
    if there["built_for"] != here["built_for"]:
        differences.append(f"horovod built for {_built(there)}, here for {_built(here)}")
    if there["gpu_build"] != here["gpu_build"]:
        with_nccl = [", ".join(facts["gpu_build"]) or "nothing" for facts in (there, here)]
        differences.append(f"horovod with NCCL for {with_nccl[0]}, here for {with_nccl[1]}")
    if differences:
        fix = "install what this machine has, at the same paths: `python -m pip freeze` on both shows all"
        return Check("packages", host, False, "; ".join(differences), fix)
    return Check("packages", host, True, ", ".join(have) + ", at the same paths")


def _built(facts: Facts) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts["built_for"].items()) or "nothing"


def _toolkit(here: Facts, there: Facts, host: str) -> Check:
    ours, theirs = here["toolkit"], there["toolkit"]
    if theirs is None:
        fix = "install it there as here (`pip install -e .`), or share its directory and set PYTHONPATH"
        return Check("toolkit", host, False, "can't be imported", fix)
    if ours is not None and theirs[0] != ours[0]:
        found = f"other source files than here: {theirs[0]} in {theirs[1]}, here {ours[0]}"
        return Check("toolkit", host, False, found, "bring both to the same commit: `git status`, `git pull` there")
    if theirs != ours:
        found = f"the same files, but in {theirs[1]}, not in {ours[1] if ours else 'an importable place'}"
        return Check("toolkit", host, False, found, "put it at the same path on every host")
    return Check("toolkit", host, True, f"the same source files, {theirs[0]}")


def _mpirun(here: Facts, there: Facts, host: str) -> Check:
    told = []
    for facts in (there, here):
        path, says = facts["mpirun"] or ["", "none"]
        told.append((path, (says.strip().splitlines() or ["nothing"])[0]))
    if told[0] == told[1]:
        return Check("mpirun", host, True, told[0][1])
    (path, says), (our_path, our_says) = told
    found = f"{says}, here {our_says}" if says != our_says else f"at {path}, here at {our_path}"
    fix = (
        f"have {our_path or 'the same mpirun'} first on the PATH of both: the same module or environment on every host"
    )
    return Check("mpirun", host, False, found, fix)


def _data(here: Facts, there: Facts, host: str) -> Check:
    ours, theirs = here["data"], there["data"]
    if not ours:
        return Check("data", host, None, "none here to compare with")
    absent = [name for name in ours if name not in theirs]
    other = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    more = [name for name in theirs if name not in ours]
    if not absent and not other and not more:
        return Check("data", host, True, f"{len(ours)} files with the same SHA-256")
    parts = (("missing", absent), ("differs from this machine's", other), ("not here", more))
    found = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)
    return Check("data", host, False, found, "copy the files from this machine, or share their directory")


def interfaces(hosts: Mapping[str, Facts], wanted: str | None) -> tuple[list[Check], dict[str, str]]:
    """A network interface of one name on all hosts, which horovodrun needs, and each host's address for connections.

    Args:
        hosts: facts of several hosts by name.
        wanted: the interface that the user named, or None.

    Returns:
        A check for each host, and addresses by host; hosts without any are left out.
    """
    name = wanted or _most_common(hosts)
    networks = {host: _networks(facts["interfaces"].get(name, [])) for host, facts in hosts.items()}
    usual = Counter(str(each.network) for found in networks.values() for each in found).most_common(1)
    subnet = usual[0][0] if usual else ""
    checks, addresses = [], {}
    for host, facts in hosts.items():
        everything = {kind: _networks(texts) for kind, texts in facts["interfaces"].items()}
        chosen = _chosen(everything, networks[host], subnet)
        if chosen is not None:
            addresses[host] = str(chosen.ip)
        if networks[host]:
            checks.append(Check("interface", host, True, _with_network(name, networks[host], subnet)))
            continue
        shown = ", ".join(f"{kind} ({each[0]})" for kind, each in everything.items() if each) or "none with an address"
        others = f"{name} ({subnet})" if name and subnet else "none in common"
        fix = f"use mpirun without --interface, or its own `--mca btl_tcp_if_include {subnet or 'SUBNET'}`, and not "
        fix += f"horovodrun; or ask your administrator for one name on all hosts, {name or 'such as eth0'}"
        checks.append(Check("interface", host, False, f"has {shown}; the others {others}", fix))
    return checks, addresses


def _most_common(hosts: Mapping[str, Facts]) -> str:
    """The interface that most hosts have, in one subnet if there is one such, with an address of its own on each."""
    ranking = []
    for name in sorted({name for facts in hosts.values() for name in facts["interfaces"]}):
        found = [each for facts in hosts.values() for each in _networks(facts["interfaces"].get(name, []))[:1]]
        addresses = {each.ip for each in found}
        if found and (len(addresses) == len(found) or len(hosts) == 1):  # docker0 has the same on all
            subnets = Counter(each.network for each in found)
            ranking.append((len(found), max(subnets.values()), name))
    return max(ranking, key=lambda each: each[:2])[2] if ranking else ""


def _networks(texts: list[str]) -> list[Any]:
    found = []
    for text in texts:
        with contextlib.suppress(ValueError):
            found.append(ipaddress.ip_interface(str(text)))  # of a number it makes one too
    return found


def _chosen(everything: Mapping[str, list[Any]], own: list[Any], subnet: str) -> Any:
    """The address to be reached at: the common interface's, or one in its subnet, or any."""
    flat = [each for found in everything.values() for each in found]
    return next(iter([*own, *(each for each in flat if str(each.network) == subnet), *flat]), None)


def _with_network(name: str, found: list[Any], subnet: str) -> str:
    if any(str(each.network) == subnet for each in found):
        return f"{name} in {subnet}"
    return f"{name} in {found[0].network}, routed to the others' {subnet}"

"""All hosts of a hostfile at the same time: reached, probed, compared with this one, and connected with each other."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.doctor import compare, gpus, login
from toolkit.doctor.checks import Check
from toolkit.doctor.login import Ssh
from toolkit.doctor.peer import Ended, NoAnswer, Peer
from toolkit.doctor.resources import resources
from toolkit.hostfile import Host

_AT_ONCE = 64  # logins
_ALL_PAIRS = 16  # hosts up to which each connects to each; of more, each to the next ones in a ring
_NEXT = 4
_LATE = 2.0  # seconds beyond its time in which a host may tell what it did not reach
# Without these a host can't take part in an all-reduce; with another clock or other data it can.
_NEEDED = ("name resolution", "ssh port", "ssh", "python", "probe", "packages", "toolkit", "mpirun", "connections")
_UNANSWERED = {
    "name resolution": "look whether this machine's name servers answer (/etc/resolv.conf), or use /etc/hosts",
    "ssh port": "look whether the host is up, and whether a firewall lets this machine through",
    "ssh": "look where `{hand}` hangs: the host may be overloaded, or its home directory away",
    "probe": "look whether the file system with {python} answers there, or give a longer --timeout",
}


_Pairs = dict[tuple[str, str], str | None]  # who connects, and to whom; None: it does, or else why not


@dataclass(frozen=True)
class Look:
    """What is wanted.

    Attributes:
        ssh: how to log in.
        seconds: for a host to be reached, and again for its probe, and for connections.
        directory: where the ranks are to work.
        data_dir: the recipes' --data-dir, or None.
        environment: the variables that travel to the ranks.
        interface: that the user named, or None.
        ranks: by host name.
    """

    ssh: Ssh
    seconds: float
    directory: str
    data_dir: str | None
    environment: Mapping[str, str]
    interface: str | None
    ranks: Mapping[str, int]


@dataclass
class Seen:
    """A host, and what has been found of it so far.

    Attributes:
        host: which one.
        stage: what is being looked at.
        here: whether it is this machine.
        checks: so far.
        peer: the probe there, once it is begun.
        facts: what it told; None: nothing that could be read.
    """

    host: Host
    stage: str = "name resolution"
    here: bool = False
    checks: list[Check] = field(default_factory=list)
    peer: Peer | None = None
    facts: dict[str, Any] | None = None

    def note(self, ok: bool | None, found: str, fix: str = "") -> None:
        """The outcome of the stage."""
        self.checks.append(Check(self.stage, self.host.name, ok, found, fix))

    def healthy(self, job: Look) -> bool:
        """Whether it can take part in an all-reduce."""
        there = self.facts is not None and self.facts["directory"]["space"] is not None
        needed = (*_NEEDED, "interface") if job.interface else _NEEDED
        return there and not any(check.ok is False and check.name in needed for check in self.checks)

    def gpus(self, job: Look) -> int:
        """GPUs with which it can take part in an all-reduce."""
        seen = gpus.read(self.facts) if self.facts is not None and self.healthy(job) else None
        wrong = any(check.ok is False and check.name in gpus.NEEDED for check in self.checks)
        return 0 if seen is None or wrong else len(seen.names)


class _Failed(Exception):
    """A stage has failed and been noted, and those after it need it."""


async def look(hosts: Sequence[Host], job: Look, here: compare.Facts) -> list[Seen]:
    """Look at all hosts at the same time.

    Args:
        hosts: each once.
        job: what is wanted.
        here: this machine's facts.

    Returns:
        What was seen of each, with the checks in the same order.
    """
    all_seen = [Seen(host) for host in hosts]
    turn = asyncio.Semaphore(_AT_ONCE)

    async def one(seen: Seen) -> None:
        async with turn:
            await _look_at(seen, job, here)

    try:
        await asyncio.gather(*(one(seen) for seen in all_seen))
        await _between(all_seen, job)
    finally:
        await asyncio.gather(*(seen.peer.close() for seen in all_seen if seen.peer is not None))
    return all_seen


async def _look_at(seen: Seen, job: Look, here: compare.Facts) -> None:
    for part in (_reach, _examine):
        try:
            await asyncio.wait_for(part(seen, job, here), job.seconds)
        except _Failed:
            return
        except asyncio.TimeoutError:
            words = {"hand": job.ssh.by_hand(seen.host), "python": sys.executable}
            seen.note(False, f"no answer in {job.seconds:g} s", _UNANSWERED[seen.stage].format(**words))
            return


async def _reach(seen: Seen, job: Look, here: compare.Facts) -> None:
    """From the host's name to a Python that answers there."""
    host = seen.host
    try:
        target = await login.target(job.ssh, host, job.seconds)
    except OSError as error:
        seen.stage = "ssh"
        seen.note(False, f"can't be run here ({error.strerror})", "install OpenSSH's client (openssh-client)")
        raise _Failed from None
    addresses = [] if target.through else await _addresses(seen, target)
    if host.name in _own_names() or any(address in _own_addresses(here) for address in addresses):
        for seen.stage in ("ssh port", "ssh"):
            seen.note(None, "this machine")
        seen.here = True
        seen.peer = Peer()
        await seen.peer.begin()
        return
    seen.stage = "ssh port"
    if target.through:
        seen.note(None, f"through {target.through}, as ssh is configured")
    else:
        await _ssh_port(seen, addresses, target.port)
    await _log_in(seen, job)


async def _addresses(seen: Seen, target: login.Target) -> list[str]:
    own = seen.host.name in _own_names()
    try:
        addresses = await login.resolve(target.name)
    except OSError as error:
        fix = "correct the name in the hostfile, or add it to /etc/hosts on every host, or to the name server"
        seen.note(False, f"{target.name} has no address ({error})", fix)
        raise _Failed from None
    if not own and any(map(login.is_loopback, addresses)) and not login.is_loopback(target.name):
        fix = f"give {target.name} its network address in /etc/hosts: to other hosts this one is of no use"
        seen.note(False, f"{target.name} is {addresses[0]}, which every host has for itself", fix)
        raise _Failed
    seen.note(True, ", ".join(addresses[:3]))
    return addresses


def _own_names() -> set[str]:
    name = socket.gethostname()
    return {name, name.partition(".")[0], "localhost"}


def _own_addresses(here: compare.Facts) -> set[str]:
    texts = [text for found in here["interfaces"].values() for text in found]
    return {text.partition("/")[0] for text in texts} | {"127.0.0.1", "::1"}


async def _ssh_port(seen: Seen, addresses: Sequence[str], port: int) -> None:
    reasons = []
    for address in addresses:
        try:
            said = await login.greeting(address, port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        else:
            if said.startswith(b"SSH-"):
                seen.note(True, f"answers at port {port}")
                return
            reason = f"it says {ascii(said[:40])}, which is not ssh's greeting"
        reasons.append(f"{address} port {port}: {reason}")
    fix = "start sshd there (`systemctl start sshd`), or give its port with --ssh-port"
    if not any("refused" in reason or "greeting" in reason for reason in reasons):
        fix = _UNANSWERED["ssh port"]
    seen.note(False, "; ".join(reasons), fix)
    raise _Failed


async def _log_in(seen: Seen, job: Look) -> None:
    seen.stage = "ssh"
    peer = seen.peer = Peer(job.ssh.command(seen.host, job.seconds))
    began = time.monotonic()
    try:
        await peer.begin()
    except NoAnswer as error:
        code, said = await peer.ended()
        if code is None or not isinstance(error, Ended):
            seen.note(False, f"no Python's answer: {error}", f"look at what `{job.ssh.by_hand(seen.host)} true` says")
        elif code in (126, 127):
            seen.note(True, f"without a password, in {time.monotonic() - began:.2f} s")
            seen.stage = "python"
            fix = f"put the same environment at {sys.prefix} there: a shared file system, or the same installation"
            seen.note(False, f"there is none that runs at {sys.executable}", fix)
        else:
            seen.note(False, *login.reason(job.ssh, seen.host, code, said))
        raise _Failed from None
    seen.note(True, f"without a password, in {time.monotonic() - began:.2f} s")


async def _examine(seen: Seen, job: Look, here: compare.Facts) -> None:
    """What the probe tells, against this machine."""
    seen.stage = "probe"
    name, peer = seen.host.name, seen.peer
    if peer is None:
        raise _Failed
    try:
        skew = compare.clock(*await peer.clock(), name)
        facts = await peer.become_probe(job.environment, job.directory, job.data_dir)
        judged = judge(here, facts, name, job.ranks.get(name), job.interface)
    except NoAnswer as error:
        if peer.python != here["python"][0]:
            seen.stage = "python"
            fix = f"put the same environment at {sys.prefix} there: a shared file system, or the same installation"
            seen.note(False, f"{peer.python} at {sys.executable}; here {here['python'][0]}", fix)
        else:
            code, said = await peer.ended()
            seen.note(
                False, f"{error}; {said.strip() or 'it said nothing'}", f"run `{sys.executable} -V` there by hand"
            )
        raise _Failed from None
    seen.facts = facts
    seen.checks += [*judged, skew]


def judge(
    here: compare.Facts, facts: compare.Facts, host: str, ranks: int | None, interface: str | None = None
) -> list[Check]:
    """A host's facts against this machine's, and against the ranks that are planned there.

    Raises:
        NoAnswer: they don't have the form of `probe.facts`.
    """
    try:
        for between in (compare.interfaces, gpus.alike):
            between({host: facts}, None)  # compared later, with the others'
        own = [*resources(facts, host, ranks), *gpus.of_host(facts, host, ranks, interface)]
        return [*compare.same(here, facts, host), *own]
    except Exception as error:  # another host's words, in which anything may be
        raise NoAnswer(f"its facts are of another form ({type(error).__name__}: {error})") from None


async def _between(all_seen: Sequence[Seen], job: Look) -> None:
    """What the hosts that answer have in common, and whether they reach each other."""
    there = {seen.host.name: seen for seen in all_seen if seen.facts is not None and seen.peer is not None}
    if len(there) < 2:
        return
    facts = {name: seen.facts for name, seen in there.items() if seen.facts}
    checks, addresses = compare.interfaces(facts, job.interface)
    for check in [*checks, *gpus.alike(facts, job.interface)]:
        there[check.host].checks.append(check)
    doors = dict(
        zip(there, await asyncio.gather(*(_door(seen, addresses, job) for seen in there.values())), strict=True)
    )
    pairs, gone = await _tried(there, doors, job)
    blamed = to_blame(pair for pair, reason in pairs.items() if reason is not None)
    for name, seen in there.items():
        seen.stage = "connections"
        address = addresses.get(name, "no address")
        if name in gone:
            fix = f"look whether `{job.ssh.by_hand(seen.host)}` still works: it may have been cut off"
            seen.note(False, "it does not answer any more", fix)
        elif doors[name] is None:
            fix = "give it a network address that others reach"
            seen.note(False, f"can't listen on a free port at {address}", fix)
        else:
            _note_connections(seen, pairs, name in blamed, address)


async def _tried(there: Mapping[str, Seen], doors: Mapping[str, list | None], job: Look) -> tuple[_Pairs, set[str]]:
    """Which hosts connect to which, and the hosts that don't answer any more, which are in no pair."""
    asked = {name: [other for other in _others(list(there), name) if doors[other]] for name in there}
    heard = await asyncio.gather(*(_knock(there[name], [doors[n] for n in asked[name]], job) for name in there))
    pairs: _Pairs = {}
    gone = set()
    for name, reasons in zip(there, heard, strict=True):
        if reasons is None:
            gone.add(name)
        else:
            pairs |= {(name, other): reason for other, reason in zip(asked[name], reasons, strict=True)}
    return {pair: reason for pair, reason in pairs.items() if not gone.intersection(pair)}, gone


def to_blame(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """Hosts that explain why some pairs have no connection, few of them.

    Those with the most such pairs, and again of the pairs that are left: a host that none reaches is not the others'
    fault. Of hosts with equally many, as the two of a single pair, all: each may be the one.
    """
    left = {frozenset(pair) for pair in pairs}
    found: set[str] = set()
    while left:
        counts = Counter(name for pair in left for name in pair)
        most = max(counts.values())
        found |= {name for name, count in counts.items() if count == most}
        left = {pair for pair in left if not pair & found}
    return found


def _others(names: list[str], name: str) -> list[str]:
    at = names.index(name)
    ring = names[at + 1 :] + names[:at]
    return ring if len(names) <= _ALL_PAIRS else ring[:_NEXT]


async def _door(seen: Seen, addresses: Mapping[str, str], job: Look) -> list | None:
    """Address, port and token of a free port of the host's; None where there is none."""
    address = addresses.get(seen.host.name)
    if address is None or seen.peer is None:
        return None
    try:
        answer = await asyncio.wait_for(seen.peer.ask({"listen": address}), job.seconds)
    except (NoAnswer, asyncio.TimeoutError):
        return None
    port = answer.get("port")
    return [address, port, seen.peer.token] if isinstance(port, int) else None


async def _knock(seen: Seen, doors: Sequence[list | None], job: Look) -> list[str | None] | None:
    """For each door None, or why this host does not reach it; None where the host does not answer any more."""
    if seen.peer is None or not doors:
        return []
    try:
        answer = await asyncio.wait_for(seen.peer.ask({"knock": doors, "seconds": job.seconds}), job.seconds + _LATE)
    except (NoAnswer, asyncio.TimeoutError):
        return None
    told = answer.get("reasons")
    if not isinstance(told, list) or len(told) != len(doors):
        return None
    return [None if reason is None else str(reason) for reason in told]


def _note_connections(seen: Seen, pairs: _Pairs, blamed: bool, address: str) -> None:
    name = seen.host.name
    reached_by = {one: reason for (one, other), reason in pairs.items() if other == name}
    if not blamed:
        count = sum(reason is None for reason in reached_by.values())
        if count:
            seen.note(True, f"reached by {count} other host{'' if count == 1 else 's'} on free ports")
        else:
            seen.note(None, "none of the other hosts is left to reach it")
        return
    what = f"not reached at {address} by"
    failed = {one: reason for one, reason in reached_by.items() if reason is not None}
    if not failed:
        what = "does not reach"
        failed = {other: reason for (one, other), reason in pairs.items() if one == name and reason is not None}
    names = ", ".join(sorted(failed)[:4]) + (" …" if len(failed) > 4 else "")
    fix = f"look whether {address} is up, and open all TCP ports between it and the other hosts, in firewalls and "
    fix += "security groups: MPI and Gloo take free ones; or name another network with --interface"
    seen.note(False, f"{what} {names} ({next(iter(failed.values()))})", fix)

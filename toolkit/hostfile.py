"""The hosts of a job and their slots: from hostfiles of Open MPI, MPICH and PBS, and from Slurm, PBS and LSF jobs.

A hostfile has a line a host, `[user@]host[:slots] [slots=N] [max_slots=N] [user=NAME]`, and comments after `#` or `//`.
A line without a number counts for one slot, as in a PBS node file, and slots on several lines add up. An IPv6 address
stands alone or in brackets.

The launchers read less, and not all alike: Open MPI 4.1 and 5 refuse `slots=` for one host on two lines, IPv6
addresses in brackets and Windows' line ends, and give a host that is named once without a number as many slots as it
has cores; horovodrun reads `host slots=N` alone. `write` gives each of them what it reads.

Sources: Open MPI's man page orte_hosts(7) and its scanner, hostfile_lex.l; MPICH's "Using the Hydra process manager";
Slurm's man page sbatch(1); OpenPBS' qsub(1); IBM Spectrum LSF's "Environment variables set for job execution". Names of
hosts are those of RFC 1123, section 2.1, and may hold `_`.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.errors import UsageError

# More than sites have, and little enough to be read in seconds; all slots together fit into a launcher's 32 bits.
MOST_HOSTS = 65_536  # as in Slurm
MOST_SLOTS = 10_000  # of a host
MOST_BYTES = 4 << 20  # of a file
MOST_MISTAKES = 20  # that are told of a file

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_KEYS = {
    **dict.fromkeys(("slots", "cpu", "count"), "slots"),
    **dict.fromkeys(("max_slots", "slots_max", "max_cpu", "cpu_max", "max_count", "count_max"), "max_slots"),
    **dict.fromkeys(("user", "username", "user_name"), "user"),
}
_NO_HOSTS = {
    "+": "counts within an allocation, which a file does not have: name the host itself",
    "^": "excludes a host: leave out the lines of hosts that are not to be used",
    "rank": "begins a line of a rank file: give a hostfile, a line a host",
}
_EXPECTED = "expected slots=N, max_slots=N or user=NAME"


class HostfileError(UsageError):
    """Lines of a hostfile can't be used.

    Its text is the first mistake's line; `mistakes` has a line for each, `MOST_MISTAKES` at most.
    """

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(mistakes)
        more = len(self.mistakes) - 1
        super().__init__(self.mistakes[0] + (f" And {more} more: see `hvdkit hosts`." if more else ""))


@dataclass(frozen=True)
class Host:
    """A host of a job; what can be constructed is safe within command lines.

    Attributes:
        name: host name, IPv4 address, or IPv6 address without brackets.
        slots: processes that it is meant to run, 1 to `MOST_SLOTS`.
        max_slots: processes that it must not exceed, `slots` to `MOST_SLOTS`; None: no limit.
        user: to log in as; None: the launcher's or ssh's choice.

    Raises:
        UsageError: one of them is not that.
    """

    name: str
    slots: int = 1
    max_slots: int | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _address(self.name))
        if not 1 <= self.slots <= MOST_SLOTS:
            raise UsageError(f"{self.name} has {self.slots} slots: expected 1 to {MOST_SLOTS}.")
        if self.max_slots is not None and not self.slots <= self.max_slots <= MOST_SLOTS:
            raise UsageError(
                f"{self.name} has max_slots={self.max_slots}: expected {self.slots}, its slots, to {MOST_SLOTS}."
            )
        if self.user is not None and not _USER.fullmatch(self.user):
            raise UsageError(f"{_shown(self.user)} is no user: expected letters, digits, '_', '.' and '-'.")

    def plus(self, other: Host) -> Host:
        """This host with another line's slots.

        Raises:
            UsageError: the lines disagree on the user or on max_slots, or the slots exceed it.
        """
        for word in ("user", "max_slots"):
            ours, theirs = getattr(self, word), getattr(other, word)
            if None not in (ours, theirs) and ours != theirs:
                raise UsageError(f"{self.name} has {word}={theirs}, and {word}={ours} before: expected the same.")
        return replace(
            self,
            slots=self.slots + other.slots,
            max_slots=self.max_slots if other.max_slots is None else other.max_slots,
            user=self.user or other.user,
        )


def read(path: str | Path) -> list[Host]:
    """The hosts of a hostfile, or of a PBS or LSF node file; of standard input where it is called `-`.

    Raises:
        UsageError: as `parse`; or it can't be read.
    """
    try:
        with open(0 if str(path) == "-" else path, "rb", closefd=str(path) != "-") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{_plain(path)}: {reason}: expected a hostfile.") from None
    return parse(content, str(path))


def parse(content: bytes, source: str) -> list[Host]:
    """The hosts of a hostfile's content, each once, in the order in which they first stand there.

    Args:
        content: of at most `MOST_BYTES`.
        source: the file's name, for errors.

    Raises:
        HostfileError: lines are not of a hostfile; names file and line, what was found and what was expected.
        UsageError: it is too long, or names no host.
    """
    source = _plain(source)
    if len(content) > MOST_BYTES:
        raise UsageError(f"{source}: has more than {MOST_BYTES} bytes: expected a hostfile.")
    lines = content.decode("utf-8-sig", "surrogateescape").split("\n")
    hosts = _Hosts()
    mistakes: list[str] = []
    for line, times in Counter(lines).items():  # a node file repeats a host's line for each of its slots
        text = re.split("#|//", line, maxsplit=1)[0].strip(" \t\f\v\r")
        if text and len(mistakes) < MOST_MISTAKES:
            try:
                host = _host(text)
                hosts.add(replace(host, slots=host.slots * times) if times > 1 else host)
            except UsageError as error:
                mistakes.append(f"{source}:{lines.index(line) + 1}: {error}")
    if mistakes:
        raise HostfileError(mistakes)
    return hosts.found(source)


def from_environment(environment: Mapping[str, str]) -> list[Host]:
    """The hosts of the Slurm, PBS or LSF job that this process is of.

    Read are SLURM_JOB_NODELIST with SLURM_TASKS_PER_NODE (without it SLURM_NTASKS_PER_NODE, or else
    SLURM_JOB_CPUS_PER_NODE), PBS_NODEFILE, LSB_DJOB_HOSTFILE, LSB_MCPU_HOSTS, LSB_HOSTS; the first that is set.

    Raises:
        UsageError: none of them is set, or what is set is not as the batch system writes it; names the variable.
    """
    nodes = next((name for name in ("SLURM_JOB_NODELIST", "SLURM_NODELIST") if environment.get(name)), None)
    if nodes:
        return _slurm(nodes, environment)
    for name in ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE"):
        if environment.get(name):
            with _located(name):
                return read(Path(environment[name]))
    hosts = _Hosts()
    for name in ("LSB_MCPU_HOSTS", "LSB_HOSTS"):
        if environment.get(name):
            with _located(name):
                words = environment[name].split()
                counts = words[1::2] if name == "LSB_MCPU_HOSTS" else ["1"] * len(words)
                names = words[::2] if name == "LSB_MCPU_HOSTS" else words
                if len(names) != len(counts):
                    raise UsageError(f"{_shown(words[-1])} has no number of slots: expected 'host slots' in pairs.")
                for host, count in zip(names, counts, strict=True):
                    hosts.add(Host(host, _count(count)))
            return hosts.found(name)
    raise UsageError(
        "the environment is of no Slurm, PBS or LSF job: none of SLURM_JOB_NODELIST, PBS_NODEFILE, LSB_DJOB_HOSTFILE, "
        "LSB_MCPU_HOSTS, LSB_HOSTS is set; run this within the job, or give a hostfile."
    )


def write(hosts: Iterable[Host], syntax: str) -> str:
    """Hosts in a program's own syntax, without a last newline.

    Args:
        hosts: each once.
        syntax: `openmpi` or `mpich`, for a hostfile's content; `horovodrun`, for its option `-H`; `slurm`, for
            `srun --nodelist`, where slots have no place. Only `openmpi` keeps `max_slots`.

    Raises:
        UsageError: the program can't be told of a host's user, or of an IPv6 address.
    """
    return _SYNTAXES[syntax](list(hosts))


def left_out(hosts: Iterable[Host], syntax: str) -> list[str]:
    """What a program's own syntax has no place for, of these hosts; a line each, with what to do.

    Args:
        hosts: at least one.
        syntax: as for `write`.
    """
    hosts = list(hosts)
    slots, notes = {host.slots for host in hosts}, []
    if syntax == "slurm" and len(slots) == 1:
        counts = f"--ntasks={sum(host.slots for host in hosts)} --ntasks-per-node={slots.pop()}"
        notes.append(f"Slurm's node list has no place for slots: give srun {counts} too.")
    elif syntax == "slurm":
        does = "`hvdkit launch --launcher srun` tells srun of them"
        notes.append(f"Slurm's node list has no place for slots, which differ between these hosts: {does}.")
    if syntax != "openmpi" and any(host.max_slots for host in hosts):
        notes.append(f"{syntax} has no place for max_slots: start no more workers on a host than it allows.")
    return notes


def add_to(commands: Any) -> None:
    """Add the command `hosts` to what `argparse.ArgumentParser.add_subparsers` gave."""
    text = "check a hostfile, or the hosts of a Slurm, PBS or LSF job, and convert them"
    command = commands.add_parser("hosts", help=text, description=text)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", metavar="FILE", help="hostfile; - for standard input")
    source.add_argument("--from-env", action="store_true", help="the job's that this runs in")
    command.add_argument("--format", choices=_SYNTAXES, help="print them as this program reads them, without the table")
    command.set_defaults(function=_command)


def _command(options: argparse.Namespace) -> int:
    try:
        hosts = from_environment(os.environ) if options.from_env else read(options.file)
    except HostfileError as error:
        for mistake in error.mistakes:
            print(f"error: {mistake}", file=sys.stderr)
        if len(error.mistakes) == MOST_MISTAKES:
            print(f"error: these are {MOST_MISTAKES} mistakes: there may be more after them.", file=sys.stderr)
        return 2
    print(write(hosts, options.format) if options.format else _table(hosts))
    for note in left_out(hosts, options.format) if options.format else ():
        print(f"note: {note}", file=sys.stderr)
    return 0


def _table(hosts: list[Host]) -> str:
    limits = any(host.max_slots for host in hosts)
    rows = [("host", "slots", "max")]
    rows += [(_login(host), str(host.slots), str(host.max_slots or "-")) for host in hosts]
    rows += [("total", str(sum(host.slots for host in hosts)), "")]
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}{slots:>12}{most if limits else '':>8}".rstrip() for name, slots, most in rows]
    return "\n".join(lines) + f"  on {len(hosts)} host{'s' if len(hosts) > 1 else ''}"


class _Hosts:
    """Hosts by name, while they are read."""

    def __init__(self) -> None:
        self._hosts: dict[str, Host] = {}

    def add(self, host: Host) -> None:
        known = self._hosts.get(host.name)
        self._hosts[host.name] = host if known is None else known.plus(host)
        if known is None and len(self._hosts) == MOST_HOSTS + 1:
            raise UsageError(f"{host.name} is one more than the {MOST_HOSTS} hosts that are expected at most.")

    def found(self, source: str) -> list[Host]:
        if not self._hosts:
            raise UsageError(f"{source}: names no host: expected lines such as 'node1 slots=4'.")
        return list(self._hosts.values())


@contextlib.contextmanager
def _located(place: str) -> Iterator[None]:
    """Say where a mistake is."""
    try:
        yield
    except HostfileError as error:
        raise HostfileError(f"{place}: {mistake}" for mistake in error.mistakes) from None
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


def _host(text: str) -> Host:
    """A line's host."""
    strange = re.search(r"[^\t\f\v -~]", text)
    if strange:
        raise UsageError(f"the character {ascii(strange[0])} is in the line: expected plain ASCII.")
    entry, *words = text.replace("=", " = ").split()
    reason = _NO_HOSTS.get(entry) or _NO_HOSTS.get(entry[0])
    if reason:
        raise UsageError(f"{_shown(entry)} {reason}.")
    if words[:1] == ["="]:
        raise UsageError(f"{_shown(entry)} is set before a host is named: expected the host first.")
    settings = _entry(entry)
    while words:
        key, equals, value = (words + ["", ""])[:3]
        if equals != "=":
            raise UsageError(f"{_shown(key)} follows the host: {_EXPECTED}.")
        name = _KEYS.get(key.replace("-", "_"))
        if name is None:
            raise UsageError(f"{_shown(key)} is no setting of a host that is known here: {_EXPECTED}.")
        if name in settings:
            raise UsageError(f"{_shown(key + equals + value)} gives {name} again: expected it once a line.")
        settings[name] = value if name == "user" else _count(value)
        words = words[3:]
    if "max_slots" in settings:
        settings.setdefault("slots", settings["max_slots"])  # as Open MPI does
    return Host(**settings)


def _entry(text: str) -> dict[str, Any]:
    """What `[user@]host[:slots]` says."""
    user, at, rest = text.rpartition("@")
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", rest)
    if bracketed:
        name, slots = bracketed[1], bracketed[2]
        if ":" not in name:
            raise UsageError(f"{_shown(rest)} is no IPv6 address, which brackets are for: expected [address].")
    elif rest.count(":") > 1:
        name, slots = rest, None
    else:
        name, colon, slots = rest.partition(":")
        slots = slots if colon else None
    found: dict[str, Any] = {"name": name}
    if at:
        found["user"] = user
    if slots is not None:
        found["slots"] = _count(slots)
    return found


def _address(text: str) -> str:
    """A host's name or address, checked, and the only way to write it for IPv6."""
    try:
        if ":" in text and "%" not in text:
            return str(ipaddress.IPv6Address(text))
        if re.fullmatch(r"[0-9.]+", text):  # the resolver takes 10 as 0.0.0.10, Open MPI 10.0.0.300 as 10
            return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise UsageError(f"{_shown(text)} is no IP address: expected one, or a host's name.") from None
    if len(text) > 253 or not _NAME.fullmatch(text):
        raise UsageError(
            f"{_shown(text)} is no host's name: expected letters, digits, '_' and '-', between dots, or an IP address."
        )
    return text


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"{_shown(text)} is no number of slots: expected 1 to {MOST_SLOTS}.")
    return int(text)


def _plain(source: str | Path) -> str:
    """A file's name on one line of a terminal."""
    return str(source) if str(source).isprintable() else ascii(str(source))


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def _slurm(variable: str, environment: Mapping[str, str]) -> list[Host]:
    with _located(variable):
        names = _expanded(environment[variable])
    order = ("SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_CPUS_PER_NODE")
    given = next((name for name in order if environment.get(name)), None)
    if given is None:
        raise UsageError(f"{variable} is set, but none of {', '.join(order)}: expected the slots of each host.")
    with _located(given):
        counts = _repeated(environment[given])
        if given == "SLURM_NTASKS_PER_NODE" and len(counts) == 1:  # a number for all
            counts *= len(names)
        if len(counts) != len(names):
            raise UsageError(f"has slots for {len(counts)} hosts: expected {len(names)}, as {variable} names.")
        hosts = _Hosts()
        for name, count in zip(names, counts, strict=True):
            hosts.add(Host(name, count))
        return hosts.found(variable)


def _expanded(nodes: str) -> list[str]:
    """The names of a node list such as `gpu[01-04,07],login1`."""
    if len(nodes) > MOST_BYTES:
        raise UsageError(f"has more than {MOST_BYTES} characters: expected a node list.")
    names: list[str] = []
    end = -1
    while end < len(nodes):
        entry = re.compile(r"(?:[^\[\],]|\[[^\[\]]*\])+").match(nodes, end + 1)
        if not entry or nodes[entry.end() : entry.end() + 1] not in ("", ","):
            raise UsageError(f"{_shown(nodes[end + 1 :])} is no node list: expected such as gpu[01-04,07],login1.")
        end, places, combinations = entry.end(), [], 1
        for part in re.findall(r"\[[^\]]*\]|[^\[]+", entry[0]):
            places.append(_numbers(part[1:-1]) if part[0] == "[" else [part])
            combinations *= len(places[-1])
            if len(names) + combinations > MOST_HOSTS:
                raise UsageError(f"{_shown(entry[0])} makes more than {MOST_HOSTS} hosts, the most that are expected.")
        names += [_address("".join(parts)) for parts in itertools.product(*places)]
    return names


def _numbers(text: str) -> list[str]:
    """The numbers of a bracket such as `01-04,07`, with their zeros."""
    numbers: list[str] = []
    for item in text.split(","):
        found = re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", item)
        low, high = (found[1], found[2] or found[1]) if found else ("", "")
        if not found or int(low) > int(high):
            raise UsageError(f"{_shown(item)} is no range of numbers in brackets: expected such as 01-04,07.")
        if len(numbers) + int(high) - int(low) >= MOST_HOSTS:
            raise UsageError(f"{_shown(f'[{text}]')} makes more than {MOST_HOSTS} hosts, the most that are expected.")
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return numbers


def _repeated(text: str) -> list[int]:
    """The numbers of a list such as `2(x3),1`."""
    counts: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", item)
        if not found:
            raise UsageError(f"{_shown(item)} is no number of slots: expected such as 2(x3),1.")
        times = int(found[2] or 1)
        if len(counts) + times > MOST_HOSTS:
            raise UsageError(f"{_shown(text)} makes more than {MOST_HOSTS} hosts, the most that are expected.")
        counts += [int(found[1])] * times
    return counts


def _login(host: Host) -> str:
    return f"{host.user}@{host.name}" if host.user else host.name


def _openmpi(hosts: list[Host]) -> str:
    for host in hosts:
        if host.user and "." in host.user:
            name = host.user.split(".")[0]
            raise UsageError(f"{_login(host)}: Open MPI would take {name} for the host: give the user to ssh.")
    limits = ("" if host.max_slots is None else f" max_slots={host.max_slots}" for host in hosts)
    return "\n".join(f"{_login(host)} slots={host.slots}{limit}" for host, limit in zip(hosts, limits, strict=True))


def _mpich(hosts: list[Host]) -> str:
    _refuse(hosts, "MPICH's hostfile", users=True)
    users = (f" user={host.user}" if host.user else "" for host in hosts)
    return "\n".join(f"{host.name}:{host.slots}{user}" for host, user in zip(hosts, users, strict=True))


def _horovodrun(hosts: list[Host]) -> str:
    _refuse(hosts, "horovodrun")
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def _nodelist(hosts: list[Host]) -> str:
    """Names with neighbours that count up in one bracket, in their order."""
    _refuse(hosts, "Slurm's node list")
    parts: list[tuple[str, list[list[str]]]] = []  # what stands before the bracket, and the bracket's ranges
    for host in hosts:
        stem, digits = re.fullmatch("(.*?)([0-9]{0,9})", host.name).groups()  # type: ignore[union-attr]
        ranges = parts[-1][1] if parts and parts[-1][0] == stem else []
        if not digits or not ranges:
            parts.append((stem, [[digits, digits]] if digits else []))
        elif digits == str(int(ranges[-1][1]) + 1).zfill(len(ranges[-1][1])):
            ranges[-1][1] = digits
        else:
            ranges.append([digits, digits])
    return ",".join(stem + _bracket(ranges) for stem, ranges in parts)


def _bracket(ranges: list[list[str]]) -> str:
    if not ranges:
        return ""
    texts = [low if low == high else f"{low}-{high}" for low, high in ranges]
    return f"[{','.join(texts)}]" if len(texts) > 1 or "-" in texts[0] else texts[0]


def _refuse(hosts: list[Host], program: str, *, users: bool = False) -> None:
    for host in hosts:
        if ":" in host.name:
            raise UsageError(f"{host.name}: {program} has no place for an IPv6 address: give the host's name.")
        if host.user and not users:
            raise UsageError(f"{_login(host)}: {program} has no place for a user: give it to ssh, in ~/.ssh/config.")


_SYNTAXES: dict[str, Callable[[list[Host]], str]] = {
    "openmpi": _openmpi,
    "mpich": _mpich,
    "horovodrun": _horovodrun,
    "slurm": _nodelist,
}

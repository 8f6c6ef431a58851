"""The commands `hvdkit doctor` and `hvdkit env`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit import hostfile, launch
from toolkit.doctor import environment, hosts, local, measure, on_gpus, probe
from toolkit.doctor.checks import Check, document, show
from toolkit.doctor.login import Ssh
from toolkit.errors import UsageError
from toolkit.hostfile import Host
from toolkit.launch import Installed, Specification

_MOST_SECONDS = 3600.0


def add_to(commands: Any) -> None:
    """Add the commands `doctor` and `env` to what `argparse.ArgumentParser.add_subparsers` gave."""
    parser = commands.add_parser(
        "doctor",
        help="is this machine, or every host of a hostfile, ready to train? ✓ and ✗, with what to do",
        description="Exit code: 0 where all is well, 1 where something is not, 2 for a mistake in the command.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--hostfile", metavar="FILE", help="look at its hosts too, all at the same time")
    source.add_argument("-H", "--hosts", metavar="HOSTS", help="hosts and slots, such as node1:4,node2:4")
    parser.add_argument(
        "-np", "--np", type=int, metavar="N", help="workers that are planned (default: the hosts' slots)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    parser.add_argument("--framework", choices=local.FRAMEWORKS, help="only this one (default: all that are installed)")
    parser.add_argument("--interface", metavar="NAME", help="network interface, of the same name on all hosts")
    parser.add_argument("--ssh-port", type=int, metavar="PORT")
    parser.add_argument("--ssh-key", metavar="FILE", help="private key")
    parser.add_argument("--data-dir", metavar="DIR", help="the recipes' --data-dir, if they are to have one")
    parser.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds that a host may take to be reached, as many to answer the probe, and as many to be connected to "
        f"(default: 10); each framework's import has {local.IMPORT_SECONDS:g}, each all-reduce {measure.SECONDS:g}",
    )
    parser.set_defaults(function=_doctor)
    environment.add_to(commands)


def _doctor(options: argparse.Namespace) -> int:
    plan = _Plan(options)
    # Before anything is begun: they take the whole process.
    facts, mpirun = probe.facts(os.getcwd(), plan.data_dir), _mpirun()
    told: list[int] = []
    try:
        return asyncio.run(_look(plan, options.json, facts, mpirun, told))
    except asyncio.CancelledError:
        return 128 + told[0]


def _mpirun() -> Installed | UsageError:
    try:
        return launch.find("mpirun", os.environ)
    except UsageError as error:
        return error


class _Plan:
    """What the options ask for, checked.

    Raises:
        UsageError: one of them can't be used.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        if not 0 < options.timeout <= _MOST_SECONDS:
            raise UsageError(f"--timeout is {options.timeout:g}: expected seconds, over 0 to {_MOST_SECONDS:g}.")
        self.hosts: list[Host] = []
        if options.hostfile is not None:
            self.hosts = hostfile.read(options.hostfile)
        elif options.hosts is not None:
            self.hosts = hostfile.parse(os.fsencode(options.hosts.replace(",", "\n")), "-H")
        key = None if options.ssh_key is None else os.path.abspath(os.path.expanduser(options.ssh_key))
        if key is not None and not os.path.isfile(key):
            raise UsageError(f"--ssh-key {key} is not there: name a private key's file.")
        self.given = {"interface": options.interface, "ssh_port": options.ssh_port, "ssh_key": key}
        whole = Specification(("true",), os.getcwd(), tuple(self.hosts), options.np, **self.given)  # checks them all
        self.data_dir = None if options.data_dir is None else os.path.abspath(options.data_dir)
        if self.data_dir is not None and not probe.data(self.data_dir):
            raise UsageError(f"--data-dir {self.data_dir} holds none of MNIST's files: name the one that recipes get.")
        self.ranks_by_host: dict[str, int] = {}
        if self.hosts:
            placed = launch.placed(whole.hosts, options.np or sum(host.slots for host in self.hosts))
            self.ranks_by_host = {host.name: host.slots for host in placed}
        self.ranks_here = None if self.hosts else options.np
        self.seconds = options.timeout
        self.frameworks = local.FRAMEWORKS if options.framework is None else (options.framework,)

    def of_hosts(self) -> hosts.Look:
        """What to look for on the hosts."""
        names = launch.travelling((), os.environ, {})
        return hosts.Look(
            ssh=Ssh(self.given["ssh_port"], self.given["ssh_key"]),
            seconds=self.seconds,
            directory=os.getcwd(),
            data_dir=self.data_dir,
            environment={name: os.environ[name] for name in names},
            interface=self.given["interface"],
            ranks=self.ranks_by_host,
        )


async def _look(
    plan: _Plan, as_json: bool, facts: Mapping[str, Any], mpirun: Installed | UsageError, told: list[int]
) -> int:
    """All checks, shown as they are done; the exit code. A signal that ends them is noted in `told`."""
    _end_on_signals(told)
    began = time.monotonic()
    everything: list[Check] = []

    def tell(checks: Sequence[Check]) -> None:
        everything.extend(checks)
        if not as_json:
            show(checks)

    looking = asyncio.ensure_future(hosts.look(plan.hosts, plan.of_hosts(), facts)) if plan.hosts else None
    try:
        async for check in local.look(facts, mpirun, plan.ranks_here, plan.frameworks):
            tell([check])
        tried = {check.name for check in everything if check.ok is not None}
        frameworks = [name for name in plan.frameworks if f"horovod for {name}" in tried]
        for framework in frameworks:
            tell([await measure.check(framework, (), {}, mpirun)])
            if gpus := on_gpus.ready(framework, facts, everything):
                tell([await measure.check(framework, (), {}, mpirun, [gpus])])
        if looking is not None:
            all_seen = await looking
            tell([check for seen in all_seen for check in seen.checks])
            for framework in frameworks:
                tell([await _over_hosts(framework, plan, all_seen, mpirun)])
                if framework in facts["gpu_build"]:
                    tell(await _over_gpus(framework, plan, all_seen, mpirun))
    finally:
        if looking is not None:
            looking.cancel()
    return _end(everything, time.monotonic() - began, as_json)


def _end_on_signals(told: list[int]) -> None:
    """Let this task be cancelled, and all that it began be ended, where the process is told to stop."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def end(number: int) -> None:
        if task is not None and not told:  # a terminal that is closed may tell twice
            told.append(number)
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wishes
            loop.add_signal_handler(number, end, number)


async def _over_hosts(
    framework: str, plan: _Plan, all_seen: Sequence[hosts.Seen], mpirun: Installed | UsageError
) -> Check:
    job = plan.of_hosts()
    healthy = [seen.host for seen in all_seen if seen.healthy(job)]
    left_out = [seen.host.name for seen in all_seen if seen.host not in healthy]
    why = "too few are well" if len(healthy) < min(2, len(all_seen)) else ""
    if len(all_seen) == 1 and all_seen[0].here and healthy:
        why = "the one host is this machine, and the one above tells of it"
    if why:
        return Check(f"{framework} over hosts", "", None, f"left out: {why}")
    found = await measure.check(framework, healthy, plan.given, mpirun)
    return Check(found.name, "", found.ok, found.found + _without(left_out), found.fix)


async def _over_gpus(
    framework: str, plan: _Plan, all_seen: Sequence[hosts.Seen], mpirun: Installed | UsageError
) -> list[Check]:
    job = plan.of_hosts()
    able = {seen.host: count for seen in all_seen if (count := seen.gpus(job))}
    if not able or (len(all_seen) == 1 and all_seen[0].here):
        return []
    found = await measure.check(framework, list(able), plan.given, mpirun, list(able.values()))
    left_out = [seen.host.name for seen in all_seen if seen.host not in able]
    return [Check(found.name, "", found.ok, found.found + _without(left_out), found.fix)]


def _without(names: Sequence[str]) -> str:
    return f"; without {', '.join(names[:4])}{' …' if len(names) > 4 else ''}" if names else ""


def _end(checks: Sequence[Check], seconds: float, as_json: bool) -> int:
    wrong = sum(check.ok is False for check in checks)
    if as_json:
        print(document(checks, seconds))
    else:
        verdict = (
            "all is well" if not wrong else f"{wrong} of {sum(check.ok is not None for check in checks)} are not well"
        )
        print(f"{len(checks)} checks in {seconds:.0f} s: {verdict}", file=sys.stdout, flush=True)
    return 1 if wrong else 0

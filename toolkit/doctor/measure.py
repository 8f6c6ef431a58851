"""A real all-reduce, started by the command that `hvdkit launch` would build, and what came of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit import launch
from toolkit.doctor import all_reduce, processes
from toolkit.doctor.checks import Check, one_line
from toolkit.doctor.resources import amount
from toolkit.errors import UsageError
from toolkit.horovod_build.logged import first_error
from toolkit.hostfile import Host
from toolkit.launch import Specification

SECONDS = 120.0  # that one may take, most of it to import the framework on every host


async def check(framework: str, hosts: Sequence[Host], given: Mapping[str, Any]) -> Check:
    """An all-reduce of one rank on each host; without hosts, of 2 ranks on this machine.

    Args:
        framework: torch or tensorflow.
        hosts: that can take part.
        given: the interface and ssh's port and key, as `launch.Specification` has them.
    """
    ranks = len(hosts) or 2
    label = f"{framework} over hosts" if hosts else f"{framework} all-reduce"
    try:
        made = launch.command(
            Specification(
                command=(sys.executable, "-m", all_reduce.__name__, framework, str(ranks)),
                directory=os.getcwd(),
                hosts=tuple(Host(host.name, 1, None, host.user) for host in hosts),
                ranks=ranks,
                **given,
            ),
            launch.find("mpirun", os.environ),
            os.environ,
        )
    except UsageError as error:
        return Check(label, "", False, str(error), "mend that first: see mpirun above")
    ended = await processes.run(made.words, SECONDS, {**os.environ, **made.environment})
    answers = [_answer(line) for line in ended.out.splitlines() if line.startswith(all_reduce.MARK)]
    failed = [answer for answer in answers if "error" in answer]
    fix = f"by hand: {made}"
    if failed:
        told = "; ".join(
            dict.fromkeys(f"{answer.get('host')}: {one_line(str(answer['error']), 200)}" for answer in failed)
        )
        return Check(label, "", False, told, fix)
    if ended.code is None:
        return Check(label, "", False, f"did not end in {SECONDS:g} s", fix)
    if ended.code != 0 or not answers:
        return Check(
            label, "", False, f"exit code {ended.code}: {one_line(first_error(ended.err + ended.out), 300)}", fix
        )
    return Check(label, "", True, described(answers[0]))


def _answer(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line[len(all_reduce.MARK) :]))
    except (ValueError, TypeError):
        return {"error": f"says {ascii(line[:80])}"}


def described(result: Mapping[str, Any]) -> str:
    """What was measured, in the words of nccl-tests."""
    ranks, seconds = result["ranks"], result["seconds"]
    algorithm = result["bytes"] / seconds / 1e9
    bus = algorithm * 2 * (ranks - 1) / ranks
    return (
        f"right on {ranks} ranks; {amount(result['bytes'])} in {seconds * 1e3:.3g} ms: algorithm bandwidth "
        f"{algorithm:.2g} GB/s, bus bandwidth {bus:.2g} GB/s; 4 bytes in {result['latency'] * 1e3:.2g} ms "
        f"(medians of {all_reduce.ROUNDS} and {all_reduce.LATENCY_ROUNDS})"
    )

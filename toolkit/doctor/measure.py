"""A real all-reduce, started by the command that `hvdkit launch` would build, and what came of it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit import launch
from toolkit.doctor import all_reduce, processes
from toolkit.doctor.checks import Check, one_line
from toolkit.doctor.resources import amount
from toolkit.errors import UsageError
from toolkit.hostfile import Host
from toolkit.launch import Installed, Specification

SECONDS = 120.0  # that one may take, most of it to import the framework on every host


async def check(
    framework: str,
    hosts: Sequence[Host],
    given: Mapping[str, Any],
    mpirun: Installed | UsageError,
    gpus: Sequence[int] = (),
) -> Check:
    """An all-reduce of one rank on each host, or 2 on a single one; without hosts, of 2 ranks on this machine.

    Args:
        framework: torch or tensorflow.
        hosts: that can take part.
        given: the interface and ssh's port and key, as `launch.Specification` has them.
        mpirun: what there is to launch with, or why there is nothing.
        gpus: where it is to be of one rank on each GPU, how many each host has; without hosts, this machine.
    """
    label = (f"{framework} over hosts" if hosts else f"{framework} all-reduce") + (", GPUs" if gpus else "")
    if isinstance(mpirun, UsageError):
        return Check(label, "", False, "there is no mpirun to start it", "mend that first: see mpirun above")
    ranks = sum(gpus) or max(2, len(hosts))
    slots = gpus or [ranks // len(hosts) for _ in hosts]
    device = "gpu" if gpus else "cpu"
    try:
        made = launch.command(
            Specification(
                command=(sys.executable, "-m", all_reduce.__name__, framework, str(ranks), device),
                directory=os.getcwd(),
                hosts=tuple(Host(host.name, n, None, host.user) for host, n in zip(hosts, slots, strict=False)),
                ranks=ranks,
                **given,
            ),
            mpirun,
            os.environ,
        )
    except UsageError as error:
        found, _, fix = str(error).rpartition(": ")
        return Check(label, "", False, found or fix, fix)
    ended = await processes.run(made.words, SECONDS, {**os.environ, **made.environment})
    return _outcome(label, ended, f"by hand{', and with NCCL_DEBUG=INFO' if gpus else ''}: {made}")


def _outcome(label: str, ended: processes.Ended, fix: str) -> Check:
    answers = [_answer(line) for line in ended.out.splitlines() if line.startswith(all_reduce.MARK)]
    failed = [f"{one.get('host')}: {one_line(str(one['error']), 200)}" for one in answers if "error" in one]
    if failed:
        return Check(label, "", False, "; ".join(dict.fromkeys(failed)), fix)
    if ended.code is None:
        return Check(label, "", False, f"did not end in {SECONDS:g} s", fix)
    if ended.code != 0 or not answers:
        return Check(label, "", False, f"exit code {ended.code}: {first_words(ended.err)}", fix)
    return Check(label, "", True, described(answers[0]))


def first_words(said: str) -> str:
    """The beginning of what a launcher said, where its reason stands, without the lines that it draws."""
    lines = [line for line in said.splitlines() if re.search(r"\w", line)]
    return one_line(" ".join(lines[:4]), 300) or "nothing said"


def _answer(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line[len(all_reduce.MARK) :]))
    except (ValueError, TypeError):
        return {"error": f"says {ascii(line[:80])}"}


def described(result: Mapping[str, Any]) -> str:
    """What was measured, in the words of nccl-tests."""
    ranks, size, seconds = result["ranks"], result["bytes"], result["seconds"]
    algorithm = size / seconds / 1e9
    bus = algorithm * 2 * (ranks - 1) / ranks
    on_gpu = result.get("device") == "gpu"
    largest = all_reduce.LARGE_ON_GPU if on_gpu else all_reduce.LARGE
    large = f", as {amount(largest)} would take over {all_reduce.SLOW:g} s," if size < largest else ""
    where = "(GPU, by NCCL)" if on_gpu else "(CPU)"
    right = f"right on {ranks} rank{'' if ranks == 1 else 's'} {where}"
    return (
        f"{right}; {amount(size)}{large} in {seconds * 1e3:.3g} ms: algorithm bandwidth "
        f"{algorithm:.2g} GB/s, bus bandwidth {bus:.2g} GB/s; 4 bytes in {result['latency'] * 1e3:.2g} ms "
        f"(medians of {all_reduce.ROUNDS} and {all_reduce.LATENCY_ROUNDS})"
    )

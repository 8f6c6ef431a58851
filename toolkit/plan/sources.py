"""Where a plan's figures are from: what the options tell, and what is measured in place of what they leave out."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolkit import hostfile
from toolkit.compression import cost
from toolkit.errors import UsageError
from toolkit.hostfile import Host
from toolkit.plan import measure, table
from toolkit.plan.cost import Link, Links
from toolkit.plan.schemes import SCHEMES, Compression, Gradients
from toolkit.plan.step import Compute, Training


@dataclass(frozen=True)
class Plan:
    """What is planned, in lines where each figure is from, and in lines what the verdict can't be taken for."""

    training: Training
    about: Sequence[str]
    warnings: Sequence[str]


def plan(options: argparse.Namespace) -> Plan:
    """Measure what the options do not tell.

    Raises:
        UsageError: as `measure.recipe` and `measure.between`; or a hostfile can't be read.
    """
    places = _Places(options)
    workers, strong = places.workers, is_strong(options)
    seen, compute, about = _compute(options, workers, strong)
    gradients = Gradients(options.gradient_mb * 1e6) if seen is None or options.gradient_mb else seen.gradients
    network, local, links = places.links(seen)
    costs, told = _compression_costs(options, gradients)
    compressions = tuple(Compression(name, costs.get(name), options.top_k, options.powersgd_rank) for name in SCHEMES)
    bucket = None if options.bucket_mb is None else options.bucket_mb * 1e6
    count = "" if gradients.shapes is None else f" in {len(gradients.shapes)} tensors"
    return Plan(
        Training(compute, gradients, Links(network, local, workers), compressions, bucket),
        [
            f"{about}; {gradients.size / 1e6:.4g} MB of gradients{count}",
            *links,
            *told,
            f"a step has {compute.samples} samples {'over all workers' if strong else 'on each worker'} "
            f"(--scaling {'weak' if strong else 'strong'} for the other); {compute.backward:.0%} of the compute "
            "time is the backward pass",
        ],
        places.warnings(options.max_workers),
    )


def is_strong(options: argparse.Namespace) -> bool:
    """Whether a step's samples are the same as workers are added."""
    return options.scaling == "strong" or (options.scaling is None and _keeps_batch(options.recipe))


def _keeps_batch(command: Sequence[str]) -> bool:
    """Whether a recipe keeps its global batch as workers are added; with --batch-size it does not."""
    return bool(command) and not any(word.split("=")[0] == "--batch-size" for word in command)


def _compute(options: argparse.Namespace, workers: int, strong: bool) -> tuple[measure.Recipe | None, Compute, str]:
    """The compute time, as it is told or as the recipe shows it, and in words where it is from."""
    seen, command = None, shlex.join(options.recipe)
    if options.compute_ms is None or options.gradient_mb is None:
        look = options.gradient_mb is None
        seen = measure.recipe(options.recipe, options.steps, workers, options.timeout, look_for_frozen=look)
    if options.compute_ms is not None or seen is None:
        seconds, samples, fixed = options.compute_ms / 1e3, options.batch or 1, (options.fixed_ms or 0.0) / 1e3
        text = f"{command or 'a model'}: {options.compute_ms:g} ms a step on one worker, as told"
    else:
        seconds, samples = seen.step.median, seen.samples
        fixed = _fixed(options, seen, workers) if strong else 0.0
        busy = f", {workers} at a time" if workers > 1 else ""
        always = f", {fixed * 1e3:.2g} ms of it whatever the batch" if strong else ""
        text = (
            f"{command}: {seconds * 1e3:.3g} ms a step on one worker{busy} (median of {options.steps}, middle half "
            f"{seen.step.low * 1e3:.3g} … {seen.step.high * 1e3:.3g}{always})"
        )
    return seen, Compute(seconds, samples, fixed, options.backward_share, samples if strong else None), text


def _compression_costs(options: argparse.Namespace, gradients: Gradients) -> tuple[dict[str, float], list[str]]:
    """Seconds a step that compressions cost, as told or, where shapes are known, measured; and where they are from."""
    costs = {"none": 0.0, **dict(options.compression_ms)}
    if gradients.shapes is None:
        return costs, []
    (none,), found = cost.measure(["none"], gradients.shapes, 2), {}
    for name in SCHEMES:  # one after the other, as each needs memory of some copies of the gradients
        if name not in costs:
            scheme = Compression(name, share=options.top_k, rank=options.powersgd_rank)
            (its,) = cost.measure([scheme.spelled], gradients.shapes, 2)
            found[name] = max(0.0, its.seconds - none.seconds)
    said = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in found.items())
    return costs | found, [f"compressing costs a step, measured here: {said}"] if found else []


def _fixed(options: argparse.Namespace, seen: measure.Recipe, workers: int) -> float:
    """Seconds of a step that a smaller batch does not save, by one more run of the recipe with a fourth of it."""
    few = seen.samples // 4
    if few == 0:
        return 0.0
    if not _keeps_batch(options.recipe):
        raise UsageError("--scaling strong with the recipe's --batch-size: give it --global-batch-size, which stays.")
    small = measure.recipe(options.recipe, options.steps, workers, options.timeout, batch=few, look_for_frozen=False)
    per_sample = (seen.step.median - small.step.median) / (seen.samples - few)
    return min(max(0.0, seen.step.median - per_sample * seen.samples), seen.step.median)


class _Places:
    """The hosts, and the links between them, each measured once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._hosts: list[Host] = []
        if options.hostfile is not None:
            self._hosts = hostfile.read(options.hostfile)
        elif options.hosts is not None:
            self._hosts = hostfile.parse(os.fsencode(options.hosts.replace(",", "\n")), "-H")
        self.workers: int = options.workers_per_host or (self._hosts[0].slots if self._hosts else 1)
        key = None if options.ssh_key is None else os.path.abspath(os.path.expanduser(options.ssh_key))
        self._given: dict[str, Any] = {"interface": options.interface, "ssh_port": options.ssh_port, "ssh_key": key}
        self._found: dict[tuple[Host, ...], measure.Between] = {}

    def links(self, seen: measure.Recipe | None) -> tuple[Link, Link, list[str]]:
        """The links between hosts and within them, and in words where they are from.

        Args:
            seen: the recipe, with whose framework they are measured; None: with one that is installed.

        Raises:
            UsageError: as `measure.between`; or the recipe computes on a GPU, whose links are not measured.
        """
        network, text = self._link("", seen, tuple(self._hosts[:2]))
        about = [f"between hosts: {table.link(network)}, {text}"]
        if self.workers == 1:
            return network, network, about
        local, text = self._link("local_", seen, tuple(self._hosts[:1]))
        return network, local, [*about, f"within a host: {table.link(local)}, {text}"]

    def warnings(self, most_workers: int) -> list[str]:
        """That one host's memory stands for the network, where it does and the plan has several hosts."""
        words = {"--latency-us": "latency", "--gbit": "rate"}
        told = {"--latency-us": self._options.latency_us, "--gbit": self._options.gbit}
        measured = [flag for flag in words if told[flag] is None]
        if not measured or len(self._hosts) > 1 or most_workers < 2 * self.workers:
            return []
        what, flags = " and ".join(words[flag] for flag in measured), " and ".join(measured)
        place = self._hosts[0].name if self._hosts else "this machine"
        return [
            f"For a network this is no plan: the {what} between hosts is that of the memory of {place}. Give the real "
            f"network's by {flags}, or two hosts to measure between by --hostfile or -H."
        ]

    def _link(self, kind: str, seen: measure.Recipe | None, hosts: tuple[Host, ...]) -> tuple[Link, str]:
        """A link as it is told, or measured, with what is told of it in place of that."""
        latency, gbit = (getattr(self._options, f"{kind}{name}") for name in ("latency_us", "gbit"))
        told = {
            "latency": None if latency is None else latency * 1e-6,
            "seconds_per_byte": None if gbit is None else 8e-9 / gbit,
            "agreement": None if self._options.agreement_us is None else self._options.agreement_us * 1e-6,
        }
        known = {name: value for name, value in told.items() if value is not None}
        if latency is not None and gbit is not None:
            return Link(**known), "as told"
        if seen and seen.on_gpu:
            flags = " and ".join(f"--{kind.replace('_', '-')}{name}" for name in ("latency-us", "gbit"))
            raise UsageError(
                f"the recipe computes on a GPU, and links are measured between CPUs alone: give {flags}, or the recipe "
                "--device cpu."
            )
        if hosts not in self._found:
            given, framework = self._given if hosts else {}, seen.framework if seen else measure.framework()
            self._found[hosts] = measure.between(framework, hosts, given, self._options.timeout)
        found = self._found[hosts]
        places, spread = " and ".join(host.name for host in hosts) or "this machine", found.all_reduce
        if not kind and len(hosts) < 2:
            places += ", in its memory in place of a network,"
        return dataclasses.replace(found.link, **known), (
            f"measured on {places} by {found.reducer} ({found.size / 1e6:.3g} MB all-reduced in "
            f"{spread.median * 1e3:.3g} ms, {spread.low * 1e3:.3g} … {spread.high * 1e3:.3g})"
        )

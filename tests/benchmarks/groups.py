"""Who competes with whom, and on what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.arena import Contestant
from tests.benchmarks.models import MODELS

OURS, RUN, HOROVOD, FLOOR = "ours", "ours in Run", "horovod as documented", "floor"
DDP, DDP_PLAIN, DDP_MPI, MULTI_WORKER = "DDP gloo", "DDP gloo, plain", "DDP mpi", "MultiWorkerMirrored"
KERAS = {backend: f"ours on {backend}" for backend in ("tensorflow", "torch")}
FIT = {backend: f"fit on {backend}, floor" for backend in KERAS}

CONTESTANTS = {
    "torch": [
        Contestant(OURS, ("torch_ours.py",), "mpirun"),
        Contestant(RUN, ("torch_ours_in_run.py",), "mpirun"),
        Contestant(HOROVOD, ("torch_horovod.py",), "mpirun"),
        Contestant(DDP, ("torch_ddp.py", "gloo", "fast")),
        Contestant(DDP_PLAIN, ("torch_ddp.py", "gloo", "plain")),
        Contestant(DDP_MPI, ("torch_ddp.py", "mpi", "fast"), "mpirun"),
        Contestant(FLOOR, ("torch_floor.py",), talks=False),
    ],
    "tensorflow": [
        Contestant(OURS, ("tensorflow_ours.py",), "mpirun"),
        Contestant(RUN, ("tensorflow_ours_in_run.py",), "mpirun"),
        Contestant(HOROVOD, ("tensorflow_horovod.py",), "mpirun"),
        Contestant(MULTI_WORKER, ("tensorflow_multiworker.py",)),
        Contestant(FLOOR, ("tensorflow_floor.py",), talks=False),
    ],
    "keras": [
        contestant
        for backend in KERAS
        for contestant in (
            Contestant(KERAS[backend], ("keras_ours.py",), "mpirun", {"KERAS_BACKEND": backend}),
            Contestant(FIT[backend], ("keras_floor.py",), environment={"KERAS_BACKEND": backend}, talks=False),
        )
    ],
}
FRAMEWORKS, RANKS = tuple(CONTESTANTS), (1, 2, 4)
# What gives each framework's right weights; Keras under Horovod's own wrapper does not synchronise at all.
REFERENCE = {"torch": HOROVOD, "tensorflow": HOROVOD, "keras": KERAS["tensorflow"]}


@dataclass(frozen=True)
class Group:
    """Contestants that run at the same time: one framework, model and number of ranks."""

    framework: str
    model: str
    ranks: int

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return f"{self.framework}:{self.model}:{self.ranks}"


ALL = [Group(framework, model, ranks) for ranks in (2, 1, 4) for framework in FRAMEWORKS for model in MODELS]
SHORT = [Group("torch", "cnn", 2)]


def selected(words: Sequence[str]) -> list[Group]:
    """The groups that words such as `torch`, `torch:cnn` or `torch:cnn:2` name; all without words.

    Raises:
        ValueError: a word names none; its text is one line.
    """
    chosen = []
    for word in words:
        parts = word.split(":")
        found = [group for group in ALL if group.name.split(":")[: len(parts)] == parts]
        if not found:
            raise ValueError(
                f"--only {word}: give framework:model:ranks, of {', '.join(FRAMEWORKS)}; {', '.join(MODELS)}; "
                f"{', '.join(map(str, RANKS))}; from the right, parts may be left out."
            )
        chosen += found
    return [group for group in ALL if group in chosen] if words else list(ALL)


@dataclass(frozen=True)
class Target:
    """What the toolkit is to reach: its step time is at most `limit` times that of the better one of `peers`."""

    framework: str
    model: str
    peers: tuple[str, ...]
    limit: float
    ours: str = OURS
    ranks: int = 2

    @property
    def text(self) -> str:
        """For tables."""
        return f"{self.framework}, {MODELS[self.model].title}: {self.ours} against {self.peers[0]}"


def _targets(framework: str, peers: tuple[str, ...], limits: dict[str, float], **more: Any) -> list[Target]:
    return [Target(framework, model, peers, limit, **more) for model, limit in limits.items()]


_AGAINST_HOROVOD = {"linear": 0.70, "cnn": 0.70, "mlp": 0.70, "mlp25m": 0.80}
TARGETS = [
    *_targets("torch", (HOROVOD,), _AGAINST_HOROVOD),
    *_targets("tensorflow", (HOROVOD,), _AGAINST_HOROVOD),
    *_targets("torch", (DDP, DDP_PLAIN), {"linear": 0.30, "cnn": 0.95, "mlp": 0.60, "mlp25m": 0.80}),
    *_targets("tensorflow", (MULTI_WORKER,), {"cnn": 0.70}),
    *_targets("torch", (FLOOR,), {"linear": 1.5, "cnn": 1.10}),
    *_targets("tensorflow", (FLOOR,), {"linear": 1.5, "cnn": 1.10}),
    *_targets("torch", (OURS,), {"cnn": 1.02}, ours=RUN),
    *_targets("tensorflow", (OURS,), {"cnn": 1.02}, ours=RUN),
]

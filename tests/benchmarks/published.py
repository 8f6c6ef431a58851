"""Scaling that others measured and published with Horovod, and what the plan's model says of the same machines.

Measured: speeds on one GPU and on 16, in images a second, are of Horovod's README of October 2017 (horovod/horovod,
pull request 44: "RDMA Horovod (allreduce on GPU with NCCL)"); efficiencies on 128 GPUs of the README that took its
place, and on 512 of Horovod's docs/benchmarks.rst. Pascal GPUs, 4 a server, 25 Gbit/s RoCE, batch 64 a GPU,
tf_cnn_benchmarks. Parameters are those of keras.io/api/applications.

Assumed, alike for all, and none of it fitted to the efficiencies:

- gradients of float32; two thirds of a step are its backward pass, in which they come into being evenly;
- Horovod's fusion buffer of then, 64 MB (docs/tensor-fusion.rst), so that many buckets; NCCL's ring;
- of 25 Gbit/s the share that is data: RoCE v2 packets of 1024 bytes take 1106 on the wire, for Ethernet with its
  preamble and gap 38, IP 20, UDP 8, InfiniBand's transport header and checksum 16;
- 6.6 µs a message between servers: NCCL's own figure for its ring, of the oldest version that has one (2.5,
  src/graph/tuning.cc); later versions say 9.6 and 14 µs for it;
- 80 Gbit/s and 5.7 µs, NCCL's for PCIe, within a server.

Not in the model: workers that are late, tensors that come into being unevenly and are not cut (VGG's largest is three
quarters of it), and Horovod's agreement on each operation.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.plan.cost import Link, Links
from toolkit.plan.schemes import Gradients
from toolkit.plan.step import Compute, Training

BATCH, GBIT, PER_HOST, FUSION = 64, 25, 4, 64e6
ON_THE_WIRE = 1024 / (1024 + 38 + 20 + 8 + 16)
LATENCY, LATEST = 6.6e-6, 14e-6  # seconds
LOCAL = Link.of(5.7e-6, 80e9)
IMAGES_PER_SECOND = {"Inception V3": 134.4, "ResNet-101": 119.4, "VGG-16": 130.9}  # on one GPU
PARAMETERS = {"Inception V3": 23.9e6, "ResNet-101": 44.7e6, "VGG-16": 138.4e6}


@dataclass(frozen=True)
class Row:
    """What was measured, and what the model is known to say.

    Attributes:
        network: a key of `PARAMETERS`.
        workers: GPUs.
        efficiency: measured, 0 to 1.
        model: the model's.
    """

    network: str
    workers: int
    efficiency: float
    model: float

    def __str__(self) -> str:
        return f"{self.network} on {self.workers}"


ROWS = (
    Row("Inception V3", 16, 2022.6 / 134.4 / 16, 0.939),
    Row("ResNet-101", 16, 1746.2 / 119.4 / 16, 0.932),
    Row("VGG-16", 16, 1787.4 / 130.9 / 16, 0.873),
    Row("Inception V3", 128, 0.90, 0.933),
    Row("ResNet-101", 128, 0.90, 0.926),
    Row("VGG-16", 128, 0.79, 0.823),
    Row("Inception V3", 512, 0.90, 0.923),
    Row("ResNet-101", 512, 0.90, 0.918),
    Row("VGG-16", 512, 0.68, 0.762),
)


def training(network: str, latency: float = LATENCY) -> Training:
    """The job, as far as its speed goes."""
    return Training(
        Compute(BATCH / IMAGES_PER_SECOND[network], BATCH),
        Gradients(4 * PARAMETERS[network]),
        Links(Link.of(latency, GBIT * 1e9 * ON_THE_WIRE), LOCAL, PER_HOST),
        bucket=FUSION,
    )


def predicted(row: Row, latency: float = LATENCY) -> float:
    """The model's efficiency, by a ring during the backward pass."""
    return _efficiency(row, latency, overlap=True)


def without_overlap(row: Row) -> float:
    """The same where nothing is hidden behind the backward pass."""
    return _efficiency(row, LATENCY, overlap=False)


def _efficiency(row: Row, latency: float, overlap: bool) -> float:
    found = training(row.network, latency).best(row.workers, all_reduces=("ring",), overlap=overlap)
    if found is None:
        raise RuntimeError(f"{row}: no ring")
    return found.efficiency

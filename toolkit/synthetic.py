"""What the synthetic-data recipes measure, alike in every framework: the models' shapes, and random batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.options import JobOptions, option
from toolkit.world import World

# ResNet-50 (He et al. 2015, arXiv:1512.03385, table 1), and a transformer as the smallest GPT-2 (Radford et al. 2019).
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "resnet50": {
        "full": {"blocks": (3, 4, 6, 3), "width": 64, "pixels": 224, "classes": 1000},
        "small": {"blocks": (1, 1, 1, 1), "width": 8, "pixels": 32, "classes": 10},
    },
    "transformer": {
        "full": {"blocks": 12, "width": 768, "heads": 12, "length": 1024, "vocabulary": 50257},
        "small": {"blocks": 2, "width": 64, "heads": 4, "length": 64, "vocabulary": 512},
    },
}
_SAMPLES = {"resnet50": 32, "transformer": 8}


@dataclass(frozen=True)
class SyntheticOptions(JobOptions):
    """The options of the synthetic-data recipes; those of the measurement are named as in Horovod's benchmarks."""

    model: str = option("resnet50", "what to train", choices=tuple(SHAPES))
    size: str = option("auto", "of the model; auto: full on a GPU, small on a CPU", choices=("auto", "small", "full"))
    batch_size: int | None = option(None, "a worker's images (default: 32) or sequences (default: 8)", minimum=1)
    precision: str = option("float32", "bf16 and fp16 are mixed with float32", choices=("float32", "bf16", "fp16"))
    compile: bool = option(False, "have the framework's compiler fuse operations; not with Keras on TensorFlow")
    learning_rate: float = option(0.01, "of SGD", above=0)
    num_warmup_batches: int = option(10, "steps before the measurement, those that compile among them", minimum=1)
    num_batches_per_iter: int = option(10, "steps of a measured iteration", minimum=1)
    num_iters: int = option(10, "measured iterations", minimum=1)
    json: Path | None = option(None, "file for the results; one that is there is replaced")


@dataclass(frozen=True)
class Workload:
    """What a worker trains on, over and over.

    Attributes:
        shape: the arguments of the recipe's function or class for the model.
        x: images, float32, shape (samples, pixels, pixels, 3), or tokens, int64, shape (samples, length).
        y: classes, int64, shape (samples,), or for each token the next one, int64, shape (samples, length).
        unit: what is counted: "images" or "tokens".
        settings: what `toolkit.throughput.measure` tells of it.
    """

    shape: dict[str, Any]
    x: np.ndarray
    y: np.ndarray
    unit: str
    settings: dict[str, Any]

    @property
    def per_step(self) -> int:
        """Images or tokens in the batch."""
        return self.y.size


def workload(options: SyntheticOptions, world: World) -> Workload:
    """This worker's batch, drawn from the seed and its rank, and the model's shape."""
    size = options.size if options.size != "auto" else "small" if world.device == "cpu" else "full"
    shape = SHAPES[options.model][size]
    samples = options.batch_size or _SAMPLES[options.model]
    settings = {
        "model": options.model,
        "size": size,
        "batch_size": samples,
        "precision": options.precision,
        "compile": options.compile,
        "compression": options.compression,
    }
    generator = np.random.default_rng([options.seed, world.rank])
    if options.model == "resnet50":
        x = generator.standard_normal((samples, shape["pixels"], shape["pixels"], 3), np.float32)
        return Workload(shape, x, generator.integers(shape["classes"], size=samples), "images", settings)
    tokens = generator.integers(shape["vocabulary"], size=(samples, shape["length"] + 1))
    return Workload(shape, tokens[:, :-1].copy(), tokens[:, 1:].copy(), "tokens", settings)

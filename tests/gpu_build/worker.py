"""A rank that reduces CPU tensors with a Horovod built for GPUs, and compares with numpy: `… worker torch`."""

import sys
from importlib import import_module

import numpy as np


def values(rank, length=1000):
    return np.random.default_rng(rank).standard_normal(length).astype(np.float32)


def main(framework):
    """Compare sums, means, a broadcast and a gathering with what numpy makes of all ranks' values."""
    library = import_module(framework)
    hvd = import_module(f"horovod.{framework}")
    tensor = library.from_numpy if framework == "torch" else library.constant
    hvd.init()
    everyone = [values(rank) for rank in range(hvd.size())]
    if hvd.size() < 2 or not hvd.nccl_built():
        sys.exit(f"{hvd.size()} ranks; nccl_built() says {hvd.nccl_built()}")
    mine = tensor(everyone[hvd.rank()].copy())
    compare(hvd.allreduce(mine, op=hvd.Sum, name="sum"), np.sum(everyone, axis=0))
    compare(hvd.allreduce(mine, op=hvd.Average, name="mean", prescale_factor=0.5), np.mean(everyone, axis=0) / 2)
    parts = hvd.grouped_allreduce([mine[:300], mine[300:]], op=hvd.Sum)
    compare(np.concatenate([part.numpy() for part in parts]), np.sum(everyone, axis=0))
    compare(hvd.broadcast(mine, 1, name="broadcast"), everyone[1])
    compare(hvd.allgather(mine, name="gather"), np.concatenate(everyone))
    print("as numpy", flush=True)
    hvd.shutdown()


def compare(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    main(sys.argv[1])

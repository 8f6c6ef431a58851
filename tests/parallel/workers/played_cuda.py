"""played_cuda.py DIRECTORY: random numbers of a run on a GPU whose generator is played; of torch, or of Keras on it.

Stopped and resumed the run is the uninterrupted one, to the bit; and it goes on on the other kind of device.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from toolkit import checkpoint, output
from toolkit.adapters import _job
from toolkit.options import RunOptions
from toolkit.run import Run

base = Path(sys.argv[1])
played = torch.Generator()
torch.cuda.get_rng_state = played.get_state
torch.cuda.set_rng_state = played.set_state
torch.cuda.manual_seed_all = played.manual_seed  # of torch.manual_seed
if "KERAS_BACKEND" in os.environ:
    import keras

    import toolkit.adapters.keras as dp
else:
    import toolkit.adapters.torch as dp

world = dp.start(seed=3)


class Data:
    x, y = np.ones((40, 2), np.float32), np.zeros((40, 1), np.float32)


def model_and_optimizer():
    if "KERAS_BACKEND" in os.environ:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
        return model, keras.optimizers.SGD(0.1)
    model = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(name, device, **options):
    """What each step drew on rank 0 and 1, and the losses."""
    _job.has_gpu = lambda: device == "gpu"
    model, optimizer = model_and_optimizer()
    optimizer = dp.distribute(optimizer, model)
    options = RunOptions(epochs=2, global_batch_size=8, seed=3, output=base / name, **options)
    drawn = []
    with Run(options, world, dp, model, optimizer, len(Data.x)) as run:
        for _ in run.epochs():
            for _ in run.batches(Data):
                drawn.append((torch.rand(1).item(), torch.rand(1, generator=played).item()))
                run.log(loss=drawn[-1][1])
            run.end_epoch()
    return dp.gather(drawn)


def check():
    straight = train("straight", "gpu")
    assert straight[0] != straight[1] and len(straight[0]) == 10  # each rank draws its own
    for stop in (0, 3, 5):
        before = train(f"stop{stop}", "gpu", max_steps=stop)
        after = train(f"stop{stop}", "gpu", resume=True)
        assert [a + b for a, b in zip(before, after, strict=True)] == straight, stop
    last = checkpoint.newest(base / "straight").state
    assert {"rank0/random/torch_cuda", "rank1/random/torch_cuda"} < set(last)

    train("to_cpu", "gpu", max_steps=3)
    after = train("to_cpu", "cpu", resume=True)
    assert [[own for own, _ in drawn] for drawn in after] == [[own for own, _ in drawn[3:]] for drawn in straight]
    assert not any("torch_cuda" in name for name in checkpoint.newest(base / "to_cpu").state)

    train("to_gpu", "cpu", max_steps=3)
    one, other = train("to_gpu", "gpu", resume=True)
    assert len(one) == 7 and not {gpu for _, gpu in one} & {gpu for _, gpu in other}  # not seeded alike
    assert not {gpu for _, gpu in one} & {gpu for drawn in straight for _, gpu in drawn}
    assert len(output.read_metrics(base / "to_gpu", "step")) == 10


def refuse_another_form():
    model, _ = model_and_optimizer()
    _job.has_gpu = lambda: True
    state = dp.export_local(model)
    for bad in ({"random/torch_cuda": np.zeros(3, np.uint8)}, {"random/other": np.zeros(1)}):
        try:
            dp.import_local(model, {**state, **bad})
        except Exception as error:
            assert "does not fit" in str(error) and next(iter(bad)) in str(error), error
        else:
            raise AssertionError(f"{bad} was taken")


check()
refuse_another_form()
if world.rank == 0:
    print("the GPU's random numbers go on")
dp.stop()

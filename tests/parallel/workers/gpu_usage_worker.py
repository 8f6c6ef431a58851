"""gpu_usage_worker.py [OPTION …]: a run of two epochs of 110 steps, of a worker that takes its CPU for a GPU."""

import torch

import toolkit.adapters.torch as dp
from toolkit import datasets, world
from toolkit.adapters import _torch_ops
from toolkit.options import RunOptions, parse
from toolkit.run import Run

launched = world.from_launcher() or world.World()
_torch_ops.visible_gpus = lambda: 2
_torch_ops.use_gpu = lambda number: "cpu"
_torch_ops.peak_memory = lambda: 100_000_000 * (launched.rank + 1)
torch.cuda.get_rng_state = torch.get_rng_state
options = parse(RunOptions, __doc__)
here = dp.start(**options.start)
data = datasets.diabetes()
model = torch.nn.Linear(10, 1)
optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.01), model)
with Run(options, here, dp, model, optimizer, 440) as run:
    for _ in run.epochs():
        for batch in run.batches(data):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(torch.from_numpy(batch.x)), torch.from_numpy(batch.y))
            (loss * batch.weight).backward()
            optimizer.step()
            run.log(loss=loss * batch.weight)
        run.end_epoch()
dp.stop()

"""An epoch whose loop goes wrong on rank 1 as told, under `--audit`."""

import os

import numpy as np
import torch

import toolkit.adapters.torch as dp
from toolkit import datasets
from toolkit.options import RunOptions, parse
from toolkit.run import Run
from toolkit.sharding import Part

BUG = os.environ["PLANTED"]
options = parse(RunOptions, __doc__)
world = dp.start(**options.start)
train = datasets.diabetes()
model = torch.nn.Linear(10, 1)
optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=0.1), model)

with Run(options, world, dp, model, optimizer, len(train)) as run:
    for _ in run.epochs():
        for batch in run.batches(train):
            indices = batch.indices
            if BUG == "wrong samples" and run.step == 2 and world.rank == 1:
                indices = np.array([3] * len(indices))
            if BUG == "same data on every rank":
                indices = dp.gather(indices)[0]
            optimizer.zero_grad()
            x, y = torch.from_numpy(train.x[indices]), torch.from_numpy(train.y[indices])
            loss = torch.nn.functional.mse_loss(model(x), y) * batch.weight
            loss.backward()
            optimizer.step()
            run.log(loss=loss, part=Part(indices, batch.weight))
        run.end_epoch()
dp.stop()

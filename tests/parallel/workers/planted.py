"""A linear regression with the bug that the environment variable PLANTED names, for `hvdkit verify` to find."""

import os
import types

import numpy as np
import torch

import toolkit.adapters.torch as adapter
from toolkit import datasets
from toolkit.options import RunOptions, parse
from toolkit.run import Run

BUG = os.environ.get("PLANTED", "")
dp = types.SimpleNamespace(**{name: getattr(adapter, name) for name in dir(adapter) if not name.startswith("_")})

options = parse(RunOptions, __doc__)
world = dp.start(seed=0)
train = datasets.diabetes()
torch.manual_seed(world.rank if BUG == "no broadcast" else 0)
model = torch.nn.Linear(10, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
if BUG != "no distribute":
    optimizer = dp.distribute(optimizer, model)
if BUG == "no broadcast":
    dp.broadcast_state = lambda model, optimizer: None
augmentation = np.random.default_rng(world.rank)

with Run(options, world, dp, model, optimizer, len(train)) as run:
    for _ in run.epochs():
        for batch in run.batches(train):
            x, y = batch.x, batch.y
            if BUG == "augmentation by rank":
                x = (x + augmentation.normal(size=x.shape, scale=0.1)).astype(np.float32)
            if BUG == "same data on every rank":
                first = next(run.sharding.global_batches(run.epoch))
                x, y = train.x[first][: len(x)], train.y[first][: len(y)]
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate() * (world.size if BUG == "rate scaled twice" else 1)
            optimizer.zero_grad()
            weight = 1.0 if BUG == "unweighted tail" else batch.weight
            loss = torch.nn.functional.mse_loss(model(torch.from_numpy(x)), torch.from_numpy(y)) * weight
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
        run.end_epoch()
dp.stop()

"""A rank whose weights are changed behind the run's back at step 7; every rank must end, naming what and where."""

import torch

import toolkit.adapters.torch as dp
from toolkit import datasets
from toolkit.options import RunOptions, parse
from toolkit.run import Run

options = parse(RunOptions, __doc__)
world = dp.start(seed=0)
train = datasets.diabetes()
model = torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
optimizer = dp.distribute(torch.optim.Adam(model.parameters(), lr=0.01), model)

with Run(options, world, dp, model, optimizer, len(train)) as run:
    for _ in run.epochs():
        for batch in run.batches(train):
            optimizer.zero_grad()
            x, y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
            loss = torch.nn.functional.mse_loss(model(x), y) * batch.weight
            loss.backward()
            optimizer.step()
            if run.step == 6 and world.rank == 1:
                with torch.no_grad():
                    model[2].bias += 0.25
            run.log(loss=loss)
        run.end_epoch()
dp.stop()

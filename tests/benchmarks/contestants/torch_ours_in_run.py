"""The toolkit with all of `Run` around the same loop, as in the recipes: rows, lines, checks that ranks agree."""

import torch_common as common

import toolkit.adapters.torch as dp
from tests.benchmarks import models
from tests.benchmarks.turns import directory
from toolkit.options import RunOptions
from toolkit.run import Run

STEPS_PER_EPOCH = 500

world = dp.start()
model = common.build()
optimizer = dp.distribute(common.optimizer(model), model)
batch = models.BATCH * world.size
options = RunOptions(
    global_batch_size=batch,
    learning_rate=models.RATE,
    epochs=10**6,
    checkpoint_every=10**6,  # what a checkpoint costs is in exactness.md
    output=directory() / "run",
)
with Run(options, world, dp, model, optimizer, STEPS_PER_EPOCH * batch) as run:
    turns = common.begin(world.rank, model)
    steps = turns.of(common.batches(world.rank))
    for _ in run.epochs():
        parts = zip(run.parts_left_in_epoch(), steps, strict=False)  # parts first: at an epoch's end no step is taken
        for part, (x, y) in run.follow((part, (part, batch)) for part, batch in parts):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate()
            optimizer.zero_grad()
            loss = common.loss_of(model(x), y) * part.weight
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
        if turns.over:
            break
        run.end_epoch()
dp.stop()

"""The toolkit under `fit`, as recipes/cnn_keras.py has it; KERAS_BACKEND says on what."""

import contextlib

import keras_common as common

import toolkit.adapters.keras as dp
from tests.benchmarks import models
from tests.benchmarks.turns import Over, directory
from toolkit.datasets import Split
from toolkit.options import RunOptions
from toolkit.run import Run

world = dp.start()
model = common.build()
optimizer = dp.distribute(common.optimizer(), model)
model.compile(optimizer=optimizer, loss=common.loss())
data = Split(*common.arrays(range(world.size)))
options = RunOptions(
    global_batch_size=models.BATCH * world.size,
    learning_rate=models.RATE,
    epochs=10**6,
    checkpoint_every=10**6,  # what a checkpoint costs is in exactness.md
    sharding="sequential",  # from each rank's own part of the arrays
    output=directory() / "run",
)
with contextlib.suppress(Over), Run(options, world, dp, model, optimizer, len(data)) as run:
    model.fit(
        dp.Batches(run, data),
        epochs=run.whole_epochs_until,
        shuffle=False,
        verbose=0,
        callbacks=[
            common.Steps(common.begin(world.rank, model)),
            dp.MetricAverage(),
            dp.RunCallback(run, {}),
        ],
    )
dp.stop()

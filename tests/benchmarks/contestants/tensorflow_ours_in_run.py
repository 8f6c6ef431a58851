"""The toolkit with all of `Run` around the same loop, as in the recipes: rows, lines, checks that ranks agree."""

import tensorflow as tf
import tensorflow_common as common

import toolkit.adapters.tensorflow as dp
from tests.benchmarks import models
from tests.benchmarks.turns import directory
from toolkit.options import RunOptions
from toolkit.run import Run

STEPS_PER_EPOCH = 500

world = dp.start()
model, loss_of = common.build(), common.loss()
optimizer = dp.distribute(common.optimizer(), model)
batch = models.BATCH * world.size
options = RunOptions(
    global_batch_size=batch,
    learning_rate=models.RATE,
    epochs=10**6,
    checkpoint_every=10**6,  # what a checkpoint costs is in exactness.md
    output=directory() / "run",
)


@tf.function(reduce_retracing=True)
def train_step(x, y, weight):
    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True)) * weight
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    return loss


with Run(options, world, dp, model, optimizer, STEPS_PER_EPOCH * batch) as run:
    turns = common.begin(world.rank, model)
    steps = turns.of(common.batches(world.rank))
    for _ in run.epochs():
        parts = zip(run.parts_left_in_epoch(), steps, strict=False)  # parts first: at an epoch's end no step is taken
        for part, (x, y) in run.follow((part, (part, batch)) for part, batch in parts):
            optimizer.learning_rate = run.learning_rate()
            run.log(loss=train_step(x, y, tf.constant(part.weight, tf.float32)))
        if turns.over:
            break
        run.end_epoch()
dp.stop()

"""The toolkit: a plain loop, as README's "Your own script" has it, without `Run`."""

import tensorflow as tf
import tensorflow_common as common

import toolkit.adapters.tensorflow as dp

world = dp.start()
model, loss_of = common.build(), common.loss()
optimizer = dp.distribute(common.optimizer(), model)
dp.broadcast_state(model, optimizer)


@tf.function(reduce_retracing=True)
def train_step(x, y):
    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


turns = common.begin(world.rank, model)
for x, y in turns.of(common.batches(world.rank)):
    train_step(x, y)
dp.stop()

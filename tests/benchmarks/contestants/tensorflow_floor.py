"""No communication: each process trains by itself. With one process: the bare loop."""

import tensorflow as tf
import tensorflow_common as common

from tests.benchmarks.turns import place

common.set_threads()
rank, _ = place()
model, loss_of, optimizer = common.build(), common.loss(), common.optimizer()


@tf.function
def train_step(x, y):
    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


turns = common.begin(rank, model)
for x, y in turns.of(common.batches(rank)):
    train_step(x, y)

"""Horovod by hand, as its documentation for TensorFlow 2 says (docs/tensorflow.rst, examples/tensorflow2).

Horovod knows TensorFlow's variables, not those of Keras 3 around them, hence `.value`.
"""

import horovod.tensorflow as hvd
import tensorflow as tf
import tensorflow_common as common

hvd.init()
common.set_threads()
model, loss_of, optimizer = common.build(), common.loss(), common.optimizer()
weights = [v.value for v in model.trainable_variables]


@tf.function
def train_step(x, y, first_batch):
    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
    tape = hvd.DistributedGradientTape(tape)
    gradients = tape.gradient(loss, weights)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    if first_batch:  # after the first step, which makes the optimizer's variables
        hvd.broadcast_variables([v.value for v in model.variables], root_rank=0)
        hvd.broadcast_variables([v.value for v in optimizer.variables], root_rank=0)
    return loss


turns = common.begin(hvd.rank(), model)
for step, (x, y) in enumerate(turns.of(common.batches(hvd.rank()))):
    train_step(x, y, step == 0)

"""The recipe's epochs by hand, without distribution: tf.data, the loop, an evaluation; prints seconds of each.

`epoch_tensorflow.py EPOCHS GLOBAL_BATCH`. Started as N processes, each trains by itself on its part of the data.
"""

import sys
import time

import numpy as np
import tensorflow as tf
import tensorflow_common as common

from tests.benchmarks.turns import place
from toolkit import datasets

common.set_threads()
rank, size = place()
epochs, batch = int(sys.argv[1]), int(sys.argv[2]) // size
train, test = datasets.digits(None)
x, y = train.x[rank::size, ..., np.newaxis], train.y[rank::size]
data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).batch(batch).prefetch(tf.data.AUTOTUNE)
test_x, test_y = tf.constant(test.x[rank::size, ..., np.newaxis]), tf.constant(test.y[rank::size])
model, loss_of = common.build(), common.loss()
optimizer = tf.keras.optimizers.SGD(0.02, momentum=0.9)


@tf.function(reduce_retracing=True)
def train_step(x, y):
    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    return loss


for _ in range(epochs):
    began = time.perf_counter()
    losses = [float(train_step(images, labels)) for images, labels in data]
    accuracy = np.mean(tf.argmax(model(test_x, training=False), 1) == test_y)
    print(f"seconds {time.perf_counter() - began} loss {np.mean(losses)} accuracy {accuracy}", flush=True)

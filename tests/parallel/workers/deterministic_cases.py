"""Three optimizers in one step, whose gradients are ready together now and then; prints the digest of what came out."""

import hashlib
import random
import time

import numpy as np
import tensorflow as tf

import toolkit.adapters.tensorflow as dp
from toolkit.options import RunOptions, parse

options = parse(RunOptions, __doc__)
world = dp.start(**options.start)
generator = np.random.default_rng(world.rank)
x, y = generator.normal(size=(16, 100)).astype(np.float32), generator.normal(size=(16, 1)).astype(np.float32)


def new_model():
    layers = [tf.keras.layers.Dense(300, activation="relu"), tf.keras.layers.Dense(200), tf.keras.layers.Dense(1)]
    return tf.keras.Sequential([tf.keras.Input((100,)), *layers])


models = [new_model() for _ in range(3)]
optimizers = [dp.distribute(tf.keras.optimizers.SGD(0.01), model) for model in models]


@tf.function
def train_step(x, y):
    for model, optimizer in zip(models, optimizers, strict=True):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


jitter = random.Random()  # of another time in every run
for step in range(60):
    if jitter.random() < 0.3:
        time.sleep(jitter.random() * 0.004)
    train_step(x + step * 0.01, y)
weights = b"".join(array.tobytes() for model in models for array in model.get_weights())
found = dp.gather(hashlib.sha256(weights).hexdigest())
if world.rank == 0:
    print("weights", set(found))
dp.stop()

"""What the TensorFlow contestants share beside `keras_common`."""

import keras_common
import tensorflow as tf

build, optimizer, loss, begin, set_threads = (
    keras_common.build,
    keras_common.optimizer,
    keras_common.loss,
    keras_common.begin,
    keras_common.set_threads,
)


def batches(rank):
    return [(tf.constant(x), tf.constant(y)) for x, y in keras_common.batches(rank)]

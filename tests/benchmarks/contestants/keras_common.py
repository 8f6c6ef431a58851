"""What every TensorFlow and Keras contestant trains: the same model from the same weights on the same batches."""

import keras
import numpy as np
from keras import layers

from tests.benchmarks import models, turns


def _stride(name, shape, before):
    return 2 if name.endswith(("block0_conv1", "skip")) and before != shape[0] else 1


def _resnet(x, shapes):
    """Convolutions and norms in the order of their names; a block's skip has come before its sum."""

    def conv(x, name):
        shape = shapes[name]
        stride = _stride(name, shape, shape[1])
        return layers.Conv2D(shape[0], shape[2], strides=stride, padding="same", name=name)(x)

    def norm(x, name):
        return layers.BatchNormalization(momentum=0.9, epsilon=models.EPSILON, name=name)(x)

    x = layers.ReLU()(norm(conv(x, "stem"), "stem_norm"))
    for block in [name.removesuffix("_conv1") for name in shapes if name.endswith("_conv1")]:
        y = layers.ReLU()(norm(conv(x, f"{block}_conv1"), f"{block}_norm1"))
        y = norm(conv(y, f"{block}_conv2"), f"{block}_norm2")
        if f"{block}_skip" in shapes:
            x = norm(conv(x, f"{block}_skip"), f"{block}_norm3")
        x = layers.ReLU()(layers.Add()([x, y]))
    return layers.Dense(shapes["top"][0], name="top")(layers.GlobalAveragePooling2D()(x))


def _plain(x, shapes):
    """Convolutions with pooling, then dense layers; ReLU after each but the last."""
    *_, last = shapes
    for name, shape in shapes.items():
        activation = None if name == last else "relu"
        if len(shape) == 4:
            x = layers.MaxPooling2D(2)(layers.Conv2D(shape[0], shape[2], activation=activation, name=name)(x))
        else:
            x = layers.Flatten()(x) if len(x.shape) > 2 else x
            x = layers.Dense(shape[0], activation=activation, name=name)(x)
    return x


def build():
    """The model, with its initial weights."""
    wanted = turns.model()
    inputs = keras.Input((*wanted.inputs[1:], *wanted.inputs[:1]))
    outputs = (_resnet if "stem" in wanted.layers else _plain)(inputs, wanted.layers)
    model = keras.Model(inputs, outputs)
    for name, kind, array in models.weights(wanted):
        layer = model.get_layer(name)
        names = ("gamma", "beta") if array.ndim == 1 and hasattr(layer, "gamma") else ("kernel", "bias")
        getattr(layer, names[kind == "bias"]).assign(models.for_keras(wanted, name, array))
    return model


def optimizer():
    return keras.optimizers.SGD(models.RATE)


def loss():
    """The loss as a Keras object, the mean over the batch."""
    if turns.model().outputs == 1:
        return keras.losses.MeanSquaredError()
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def batches(rank):
    return [(models.channels_last(x), y) for x, y in models.batches(turns.model(), rank)]


def set_threads():
    """As many compute threads as every contestant has."""
    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(turns.threads())
    else:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(turns.threads())
        tf.config.threading.set_inter_op_parallelism_threads(max(2, turns.threads()))


def used_threads():
    if keras.backend.backend() == "torch":
        import torch

        return torch.get_num_threads()
    import tensorflow as tf

    return tf.config.threading.get_intra_op_parallelism_threads()


def begin(rank, model):
    """Meet the benchmark's controller, once the model is ready to train."""
    return turns.Turns(
        rank,
        used_threads(),
        lambda: ((v.path, keras.ops.convert_to_numpy(v.value)) for v in model.trainable_variables),
    )


class Steps(keras.callbacks.Callback):
    """Has `fit` take steps as the controller asks for them; the first of its callbacks."""

    def __init__(self, turns):
        super().__init__()
        self._turns = turns

    def on_train_batch_begin(self, batch, logs=None):
        if not self._turns.take():
            raise turns.Over


def arrays(ranks, steps_per_epoch=50):
    """The batches of these ranks one behind the other, as two arrays; each rank's are repeated to fill an epoch."""
    x, y = [], []
    for rank in ranks:
        own = batches(rank)
        for step in range(steps_per_epoch):
            x.append(own[step % len(own)][0])
            y.append(own[step % len(own)][1])
    return np.concatenate(x), np.concatenate(y)

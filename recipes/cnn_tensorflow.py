"""Train a small convolutional network on handwritten digits with TensorFlow.

    horovodrun -np 2 python recipes/cnn_tensorflow.py
    mpirun -np 2 --hostfile hostfiles/localhost python recipes/cnn_tensorflow.py
    python recipes/cnn_tensorflow.py

Lines marked `# distributed` are what data-parallel training adds to the script for one process.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

import toolkit.adapters.tensorflow as dp  # distributed
from toolkit import datasets, initial_weights
from toolkit.elastic import elastic
from toolkit.folds import each_fold
from toolkit.options import RunOptions, option, parse
from toolkit.run import Run
from toolkit.sharding import block


@dataclass(frozen=True)
class Options(RunOptions):
    momentum: float = option(0.9, "of SGD", minimum=0)
    dropout: float = option(0.0, "share of the hidden units left out", minimum=0, below=1)
    shift: int = option(0, "augmentation: pixels that a training image is moved by at most", minimum=0, maximum=8)
    data_dir: Path | None = option(
        None, "directory of MNIST's IDX files, plain or .gz, or of train_x.npy … (default: digits of scikit-learn)"
    )


def build_model(dropout):
    return tf.keras.Sequential(
        [
            tf.keras.Input((28, 28, 1)),
            tf.keras.layers.Conv2D(10, 5, activation="relu"),
            tf.keras.layers.MaxPooling2D(2),
            tf.keras.layers.Conv2D(20, 5, activation="relu"),
            tf.keras.layers.MaxPooling2D(2),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(50, activation="relu"),
            tf.keras.layers.Dropout(dropout),
            tf.keras.layers.Dense(10),
        ]
    )


cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def inputs(images):
    return images[..., np.newaxis]


def evaluate(model, data, world):
    mine = block(len(data), world.rank, world.size)  # distributed: this rank's part of the test data
    x, y = dp.on_device(inputs(data.x[mine]), data.y[mine])
    accuracy = np.mean(tf.argmax(model(x, training=False), 1) == y) if len(y) else 0.0
    return dp.average({"test_accuracy": accuracy}, weight=len(y))  # distributed: mean over all samples


@elastic(dp)  # distributed: workers may die and come, under horovodrun --host-discovery-script
def fit(world, options, train, test):
    model = build_model(options.dropout)
    model.set_weights(initial_weights.for_keras(initial_weights.cnn(options.seed)))
    optimizer = tf.keras.optimizers.SGD(options.learning_rate, momentum=options.momentum)
    optimizer = dp.distribute(optimizer, model, **options.distribute)  # distributed

    @tf.function(reduce_retracing=True)
    def train_step(x, y, weight):
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True)) * weight  # distributed: exact for unequal parts
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    def augmented(batch):
        return inputs(datasets.shifted(batch.x, batch.generators(), options.shift))

    with Run(options, world, dp, model, optimizer, len(train)) as run:  # distributed: resume, broadcast
        for _ in run.epochs():
            for batch in run.tensors(train, augmented):  # distributed: this rank's part of each global batch
                optimizer.learning_rate = run.learning_rate()  # distributed: scaled with the batch, warmed up
                run.log(loss=train_step(batch.x, batch.y, tf.constant(batch.weight, tf.float32)))
            run.end_epoch(**evaluate(model, test, world))


def main():
    options = parse(Options, __doc__)
    world = dp.start(**options.start)  # distributed
    train, test = datasets.digits(options.data_dir)
    for fold in each_fold(options, world, dp, train, test):  # once, without --folds
        fit(world, *fold)
    dp.stop()  # distributed


if __name__ == "__main__":
    main()

"""Train a small convolutional network on handwritten digits with Keras 3.

    horovodrun -np 2 python recipes/cnn_keras.py
    mpirun -np 2 --hostfile hostfiles/localhost python recipes/cnn_keras.py
    python recipes/cnn_keras.py

KERAS_BACKEND=torch runs it on PyTorch in place of TensorFlow.
Lines marked `# distributed` are what data-parallel training adds to the script for one process.
"""

from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

import toolkit.adapters.keras as dp  # distributed
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
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(10, 5, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(20, 5, activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(50, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(10),
        ]
    )


def inputs(images):
    return images[..., np.newaxis]


@elastic(dp)  # distributed: workers may die and come, under horovodrun --host-discovery-script
def fit(world, options, train, test):
    model = build_model(options.dropout)
    model.set_weights(initial_weights.for_keras(initial_weights.cnn(options.seed)))
    optimizer = keras.optimizers.SGD(options.learning_rate, momentum=options.momentum)
    optimizer = dp.distribute(optimizer, model, **options.distribute)  # distributed
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])

    def augmented(batch):
        return inputs(datasets.shifted(batch.x, batch.generators(), options.shift))

    mine = block(len(test), world.rank, world.size)  # distributed: this rank's part of the test data

    with Run(options, world, dp, model, optimizer, len(train)) as run:  # distributed: resume, broadcast
        while not run.finished:  # distributed: once; twice where it resumes within an epoch
            model.fit(
                dp.Batches(run, train, augmented),  # distributed: this rank's part of each global batch
                validation_data=(inputs(test.x[mine]), test.y[mine]),
                initial_epoch=run.epoch,
                epochs=run.whole_epochs_until,
                shuffle=False,
                verbose=0,
                callbacks=[
                    dp.MetricAverage(),  # distributed: mean over all samples
                    dp.RunCallback(run, {"test_accuracy": "val_accuracy"}),  # distributed: rate, log
                ],
            )


def main():
    options = parse(Options, __doc__)
    world = dp.start(**options.start)  # distributed
    train, test = datasets.digits(options.data_dir)
    for fold in each_fold(options, world, dp, train, test):  # once, without --folds
        fit(world, *fold)
    dp.stop()  # distributed


if __name__ == "__main__":
    main()

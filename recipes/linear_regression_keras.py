"""Fit a linear regression to the diabetes data with Keras 3, to the least-squares solution.

    horovodrun -np 2 python recipes/linear_regression_keras.py
    mpirun -np 2 --hostfile hostfiles/localhost python recipes/linear_regression_keras.py
    python recipes/linear_regression_keras.py

KERAS_BACKEND=torch runs it on PyTorch in place of TensorFlow.
Lines marked `# distributed` are what data-parallel training adds to the script for one process.
"""

from dataclasses import dataclass

import keras
import numpy as np

import toolkit.adapters.keras as dp  # distributed
from toolkit import datasets, initial_weights
from toolkit.elastic import elastic
from toolkit.folds import each_fold
from toolkit.options import RunOptions, option, parse
from toolkit.run import Run


@dataclass(frozen=True)
class Options(RunOptions):
    epochs: int = option(250, "times that each sample is used", minimum=1)
    global_batch_size: int = option(442, "samples per step over all workers; 442 is all of them", minimum=1)
    learning_rate: float = option(0.4, "for the global batch size, or for one worker's --batch-size", above=0)
    checkpoint_every: int = option(50, "epochs between checkpoints; the last epoch has one always", minimum=1)
    print_every: int = option(50, "epochs between printed lines", minimum=1)
    momentum: float = option(0.9, "of SGD", minimum=0)
    dropout: float = option(0.0, "share of the features left out", minimum=0, below=1)
    noise: float = option(0.0, "augmentation: standard deviation of noise added to the features", minimum=0)


def half_squared_error(y, predicted):
    return 0.5 * keras.ops.mean(keras.ops.square(predicted - y), axis=-1)


def metrics(weight, bias, train, test):
    """Distance to numpy's least-squares weights, relative to the largest; with --folds, the held-out error."""
    exact = np.append(*datasets.least_squares(train.x, train.y))
    distance = np.abs(np.append(weight, bias) - exact).max() / np.abs(exact).max()
    errors = test.x @ weight.reshape(-1, 1) + bias - test.y
    held_out = {"held_out_squared_error": float(np.mean(errors**2))} if len(test) else {}
    return {"distance_to_least_squares": float(distance), **held_out}


class Metrics(keras.callbacks.Callback):
    def __init__(self, train, test):
        super().__init__()
        self.data = train, test

    def on_epoch_end(self, epoch, logs):
        logs.update(metrics(*self.model.get_weights(), *self.data))


@elastic(dp)  # distributed: workers may die and come, under horovodrun --host-discovery-script
def fit(world, options, train, test):
    model = keras.Sequential(
        [keras.Input((train.x.shape[1],)), keras.layers.Dropout(options.dropout), keras.layers.Dense(1)]
    )
    model.set_weights(initial_weights.for_keras(initial_weights.linear(train.x.shape[1], options.seed)))
    optimizer = keras.optimizers.SGD(options.learning_rate, momentum=options.momentum)
    optimizer = dp.distribute(optimizer, model, **options.distribute)  # distributed

    model.compile(optimizer=optimizer, loss=half_squared_error)

    def augmented(batch):
        return datasets.with_noise(batch.x, batch.generators(), options.noise)

    names = {name: name for name in metrics(*model.get_weights(), train, test)}
    with Run(options, world, dp, model, optimizer, len(train)) as run:  # distributed: resume, broadcast
        while not run.finished:  # distributed: once; twice where it resumes within an epoch
            model.fit(
                dp.Batches(run, train, augmented),  # distributed: this rank's part of each global batch
                initial_epoch=run.epoch,
                epochs=run.whole_epochs_until,
                shuffle=False,
                verbose=0,
                callbacks=[
                    Metrics(train, test),
                    dp.RunCallback(run, names),  # distributed: rate, log
                ],
            )


def main():
    options = parse(Options, __doc__)
    world = dp.start(**options.start)  # distributed
    train = datasets.diabetes()
    for fold in each_fold(options, world, dp, train, train.take([])):  # once, without --folds
        fit(world, *fold)
    dp.stop()  # distributed


if __name__ == "__main__":
    main()

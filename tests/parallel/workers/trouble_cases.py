"""Numbers that are not finite on one rank, and one rank's wish to stop: what all ranks make of it.

Arguments: the adapter's name, and a directory. A linear model without bias is trained by SGD, so that numpy can
do the same steps. A BatchNorm beside it looks on, so that its statistics are there to be spoilt.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from toolkit import checkpoint
from toolkit.datasets import Split
from toolkit.errors import RunFailed
from toolkit.options import RunOptions
from toolkit.output import read_metrics
from toolkit.run import Run
from toolkit.sharding import Sharding

framework, base = sys.argv[1], Path(sys.argv[2])
dp = importlib.import_module(f"toolkit.adapters.{framework}")
world = dp.start()
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(64, 3)).astype(np.float32), rng.normal(size=(64, 1)).astype(np.float32)
BAD_EPOCH, BATCH, RATE, EPOCHS = 1, 16, 0.05, 3
BAD_SAMPLE = list(Sharding(len(X), BATCH, 1, 0).parts(BAD_EPOCH, 0))[1].indices[0]  # of the second step of four


class Case:
    """What goes wrong in one run: `gradient` or `loss` at the bad sample, or `stop` by its rank after it, or nothing;
    `last loss` or `every loss` of the bad epoch, on the bad rank; `every gradient` from that epoch on; or `overflow`:
    of what travels as fp16, while each rank's gradients are finite."""

    what = ""


def spoilt(batch):
    x = batch.x.copy()
    if Case.what == "gradient" and batch.epoch == BAD_EPOCH:
        x[batch.indices == BAD_SAMPLE] = np.inf
    if Case.what == "every gradient" and batch.epoch >= BAD_EPOCH:
        x[:] = np.inf
    return x


def has_bad_sample(epoch, indices):
    return epoch == BAD_EPOCH and BAD_SAMPLE in indices


def train(options):
    make = {"torch": train_torch, "tensorflow": train_tensorflow, "keras": train_keras}[framework]
    return make(options)


def loop(run, step):
    for _ in run.epochs():
        for batch in run.batches(Split(X, Y)):
            loss = step(spoilt(batch), batch.y, batch.weight)
            bad_epoch = batch.epoch == BAD_EPOCH and world.rank == bad_rank
            if (
                (Case.what == "loss" and has_bad_sample(batch.epoch, batch.indices))
                or (Case.what == "last loss" and bad_epoch and run.steps_left_in_epoch == 1)
                or (Case.what == "every loss" and bad_epoch)
            ):
                loss = loss + np.float32(np.inf)
            run.log(loss=loss)
            if Case.what == "stop" and has_bad_sample(batch.epoch, batch.indices):
                run.stop()
        run.end_epoch()


def train_torch(options):
    import torch

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 1, bias=False)
            self.norm = torch.nn.BatchNorm1d(3, affine=False)

        def forward(self, x):
            return self.linear(x) + 0 * self.norm(x).sum(1, keepdim=True)

    model = Watched()
    torch.nn.init.zeros_(model.linear.weight)
    compression = "fp16" if Case.what == "overflow" else "none"
    optimizer = dp.distribute(torch.optim.SGD(model.parameters(), lr=RATE), model, compression=compression)

    def step(x, y, weight):
        optimizer.zero_grad()
        weight *= 1e8 if Case.what == "overflow" else 1
        loss = torch.nn.functional.mse_loss(model(torch.from_numpy(x)), torch.from_numpy(y)) * weight
        loss.backward()
        optimizer.step()
        return loss

    with Run(options, world, dp, model, optimizer, len(X)) as run:
        loop(run, step)
    return run, model.linear.weight.detach().numpy().ravel(), model.norm.running_mean.numpy()


def keras_model():
    import keras

    class Linear(keras.layers.Dense):
        def build(self, shape):
            super().build(shape)
            self.add_weight(name="unused", shape=())  # one without a gradient is not one that is not finite

    x = keras.layers.Input((3,))
    linear = Linear(1, use_bias=False, kernel_initializer="zeros", name="linear")(x)
    norm = keras.layers.BatchNormalization(center=False, scale=False, momentum=0.9, name="norm")(x)
    return keras.Model(x, linear + 0 * keras.ops.sum(norm, axis=1, keepdims=True))


def looked_at(model):
    """The linear layer's weights, and the mean that BatchNorm has seen."""
    import keras

    mean = model.get_layer("norm").moving_mean
    return model.get_layer("linear").get_weights()[0].ravel(), keras.ops.convert_to_numpy(mean)


def train_tensorflow(options):
    import keras
    import tensorflow as tf

    model = keras_model()
    optimizer = dp.distribute(keras.optimizers.SGD(RATE), model)

    @tf.function(reduce_retracing=True)
    def step(x, y, weight):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2) * weight
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    with Run(options, world, dp, model, optimizer, len(X)) as run:
        loop(run, lambda x, y, weight: step(x, y, np.float32(weight)))
    return run, *looked_at(model)


def train_keras(options):
    import keras

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.parts = run.parts_left_in_epoch()

        def on_train_batch_end(self, batch, logs=None):
            if Case.what == "stop" and has_bad_sample(run.epoch, next(self.parts).indices):
                self.model.stop_training = True

    model = keras_model()
    optimizer = dp.distribute(keras.optimizers.SGD(RATE), model)
    model.compile(optimizer, loss="mse")
    with Run(options, world, dp, model, optimizer, len(X)) as run:
        while not run.finished:
            model.fit(
                dp.Batches(run, Split(X, Y), spoilt),
                initial_epoch=run.epoch,
                epochs=run.whole_epochs_until,
                shuffle=False,
                verbose=0,
                callbacks=[dp.MetricAverage(), Stop(), dp.RunCallback(run, {})],
            )
    return run, *looked_at(model)


def by_numpy(left_out):
    """The weights after all epochs, without the step of the bad sample where it is left out; the mean that this rank's
    BatchNorm then has seen; and that step's number."""
    weights, mean, bad_step = np.zeros((3, 1)), np.zeros(3), None
    sharding = Sharding(len(X), BATCH, 1, 0)
    step = 0
    for epoch in range(EPOCHS):
        own_parts = Sharding(len(X), BATCH, world.size, 0).parts(epoch, world.rank)
        for part, own in zip(sharding.parts(epoch, 0), own_parts, strict=True):
            step += 1
            x, y = X[part.indices].astype(float), Y[part.indices].astype(float)
            if has_bad_sample(epoch, part.indices):
                bad_step = step
                if left_out:
                    continue
            weights -= RATE * 2 * x.T @ (x @ weights - y) / len(x)
            mean = 0.9 * mean + 0.1 * X[own.indices].mean(axis=0)
    return weights.ravel(), mean, bad_step


# Which rank has the bad sample.
parts = [list(Sharding(len(X), BATCH, world.size, 0).parts(BAD_EPOCH, rank)) for rank in range(world.size)]
bad_rank = next(rank for rank in range(world.size) if any(BAD_SAMPLE in part.indices for part in parts[rank]))
options = RunOptions(epochs=EPOCHS, global_batch_size=BATCH, learning_rate=RATE)
left_out, mean_left_out, bad_step = by_numpy(left_out=True)
assert not np.allclose(left_out, by_numpy(left_out=False)[0], rtol=1e-3)

Case.what = "gradient"
run, weights, mean = train(replace(options, on_nan="skip", output=base / "skip"))
assert np.allclose(weights, left_out, rtol=1e-4), (weights, left_out)
assert np.allclose(mean, mean_left_out, rtol=1e-4, atol=1e-6), (mean, mean_left_out)
if world.rank == 0:
    rows = read_metrics(base / "skip", "step")
    assert [row["step"] for row in rows if row.get("skipped")] == [bad_step], rows
    assert [row["step"] for row in rows if row["loss"] is None] == [bad_step], rows
    epochs = read_metrics(base / "skip", "epoch")
    assert [row.get("not_finite", 0) for row in epochs] == [0, 1, 0] and np.isfinite(epochs[1]["train_loss"]), epochs

for what, told in ("gradient", "not finite in step"), ("loss", "loss inf in step"):
    if framework == "keras" and what == "loss":
        continue  # what fit() takes as the loss is what it derives
    Case.what = what
    try:
        train(replace(options, on_nan="stop", output=base / f"stop-{what}"))
        raise AssertionError("trained on")
    except RunFailed as error:
        assert f"rank {bad_rank} on" in str(error) and f"{told} {bad_step}".split(" in ")[0] in str(error), error
        assert f"in step {bad_step}" in str(error), error
    if world.rank == 0:  # what led there is there to see
        rows = read_metrics(base / f"stop-{what}", "step")
        assert [row["step"] for row in rows][:bad_step] == [*range(1, bad_step + 1)], rows
        assert [row["step"] for row in rows if row["loss"] is None] == [bad_step], rows

if framework != "keras":
    Case.what = "last loss"
    try:
        train(replace(options, output=base / "last"))
        raise AssertionError("trained on")
    except RunFailed as error:
        assert f"rank {bad_rank} on" in str(error) and f"loss inf in step {len(X) // BATCH * 2}" in str(error), error
    Case.what = "every loss"
    run, weights, _ = train(replace(options, on_nan="skip", output=base / "every"))
    assert np.allclose(weights, by_numpy(left_out=False)[0], rtol=1e-4)
    if world.rank == 0:
        losses = [row["train_loss"] for row in read_metrics(base / "every", "epoch")]
        assert losses[1] is None and losses[0] and losses[2], losses

Case.what = "every gradient"
try:
    train(replace(options, on_nan="skip", epochs=100, output=base / "hopeless"))
    raise AssertionError("trained on")
except RunFailed as error:
    assert "the last 10 steps were all left out" in str(error), error
if world.rank == 0:
    rows = read_metrics(base / "hopeless", "step")
    steps = len(X) // BATCH
    assert [row.get("skipped", False) for row in rows] == [False] * steps + [True] * 10, rows

if framework == "torch":
    Case.what = "overflow"
    try:
        train(replace(options, output=base / "overflow"))
        raise AssertionError("trained on")
    except RunFailed as error:
        assert "the mean of all ranks' gradients overflows" in str(error), error

Case.what = "stop"
run, _, _ = train(replace(options, output=base / "early"))
assert run.finished and run.step == bad_step + 1, run.step
if world.rank == 0:
    assert [checkpoint.read(path).manifest["step"] for path in checkpoint.steps(base / "early")][-1] == run.step
Case.what = ""
run, resumed, _ = train(replace(options, output=base / "early", resume=True))
if world.rank == 0:
    print("resumed after the early stop")
assert np.allclose(resumed, by_numpy(left_out=False)[0], rtol=1e-4)
print("trouble met as promised")
dp.stop()

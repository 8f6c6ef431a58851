"""Input pipelines under Keras' `fit`, on both backends, and on TensorFlow in a `GradientTape` loop."""

import warnings
from dataclasses import replace

import keras
import numpy as np
from input_common import (
    BASE,
    FEATURES,
    NOISE,
    OPTIONS,
    SAMPLES,
    WEIGHTS,
    Arrays,
    X,
    Y,
    check_losses,
    check_resume,
    losses,
    losses_in_numpy,
    refused,
)

import toolkit.adapters.keras as dp
from toolkit.random_streams import sample_generator, sample_seeds
from toolkit.run import Run


class Pairs:
    """A map-style dataset, with the input in a nest, as models of several inputs have it."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        assert type(index) is int
        return {"features": X[index]}, Y[index]


def with_noise(batch):
    noise = [generator.standard_normal(FEATURES) for generator in batch.generators()]
    x = batch.x["features"] if isinstance(batch.x, dict) else batch.x
    return x + np.float32(NOISE) * np.array(noise, np.float32)


def noise_in_numpy(indices, epoch):
    noise = [sample_generator(OPTIONS.seed, epoch, index).standard_normal(FEATURES) for index in indices]
    return X[indices] + NOISE * np.array(noise)


def linear():
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(1, use_bias=False, name="out")])
    model.set_weights([WEIGHTS])
    return model, keras.optimizers.SGD(0.1)


def with_dropout():
    keras.utils.set_random_seed(1)
    dense, dropout = keras.layers.Dense(8, name="dense"), keras.layers.Dropout(0.4, name="dropout")
    model = keras.Sequential([keras.Input((FEATURES,)), dense, dropout, keras.layers.Dense(1, name="out")])
    return model, keras.optimizers.Adam(0.1, name="adam")


def fit(world, options, build, data):
    """`data(run)` is made in each call of `fit`."""
    keras.utils.clear_session()
    model, optimizer = build()
    optimizer = dp.distribute(optimizer, model)
    model.compile(optimizer=optimizer, loss="mse")
    with Run(options, world, dp, model, optimizer, SAMPLES) as run, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "Your input ran out of data" is one
        while not run.finished:
            model.fit(
                data(run),
                initial_epoch=run.epoch,
                epochs=run.whole_epochs_until,
                shuffle=False,
                verbose=0,
                callbacks=[dp.MetricAverage(), dp.RunCallback(run, {})],
            )
    dp.gather(None)  # rank 0 has written it


def check_batches(world):
    expected = losses_in_numpy(noise_in_numpy)
    pipelines = {"here": {}}
    if dp.BACKEND == "tensorflow" and world.size == 2:
        pipelines["threads"] = {"workers": 3, "max_queue_size": 2}
        pipelines["processes"] = {"workers": 2, "use_multiprocessing": True}
    for name, options in pipelines.items():

        def data(run, options=options):
            return dp.Batches(run, Pairs(), with_noise, **options)

        fit(world, replace(OPTIONS, output=BASE / name), linear, data)
        check_losses(name, losses(BASE / name), expected)
    if world.size == 2:
        fit(world, replace(OPTIONS, output=BASE / "arrays"), linear, lambda r: dp.Batches(r, Arrays, with_noise))
        assert losses(BASE / "arrays") == losses(BASE / "here")
        check_resume("resume batches", lambda o: fit(world, o, with_dropout, data), dp.gather, steps=12, stop=8)


def mistakes(world):
    model, optimizer = linear()
    optimizer = dp.distribute(optimizer, model)
    model.compile(optimizer=optimizer, loss="mse")
    with Run(replace(OPTIONS, output=BASE / "mistakes"), world, dp, model, optimizer, SAMPLES) as run:
        refused(lambda: dp.Batches(run, iter(Pairs())), "iterator", "data[index]")
        refused(lambda: dp.Batches(run, list(Pairs())[:9]), "9 samples", "22")
        if dp.BACKEND == "torch":
            refused(lambda: dp.Batches(run, Pairs(), workers=2), "workers=2", "torch_data")
            refused(lambda: dp.torch_data(run, Pairs(), shuffle=False), "shuffle")
            batches = dp.Batches(run, Pairs(), with_noise)
            refused(lambda: model.fit(batches, verbose=0, callbacks=[dp.RunCallback(run, {})]), "shuffle=False")
        else:
            refused(lambda: dp.tf_data(run, lambda index, seed: index), "load(index, seed) gives", "(x, y)")
        callbacks = [dp.RunCallback(run, {})]
        refused(lambda: model.fit(X, Y, batch_size=2, verbose=0, callbacks=callbacks), "11 batches", "6 left")


class Transformed:
    """A map-style dataset with a random transform of torch's."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        import torch

        return X[index] + NOISE * torch.randn(FEATURES).numpy(), Y[index]


def check_torch_data(world):
    import torch

    def noise_one_by_one(indices, epoch):
        seeds = sample_seeds(OPTIONS.seed, epoch, indices).tolist()
        noise = [torch.randn(FEATURES, generator=torch.Generator().manual_seed(seed)).numpy() for seed in seeds]
        return X[indices] + NOISE * np.stack(noise)

    def data(run):
        workers = 2 if world.size == 2 else 0
        return dp.torch_data(run, Transformed(), num_workers=workers, persistent_workers=workers > 0)

    fit(world, replace(OPTIONS, output=BASE / "fit"), linear, data)
    check_losses("fit", losses(BASE / "fit"), losses_in_numpy(noise_one_by_one))
    if world.size == 2:
        check_resume("resume fit", lambda o: fit(world, o, with_dropout, data), dp.gather, steps=12, stop=8)


def check_tf_data(world):
    import tensorflow as tf

    import toolkit.adapters.tensorflow as loop_adapter

    def load(index, seed):
        return tf.gather(X, index) + NOISE * tf.random.stateless_normal((FEATURES,), seed), tf.gather(Y, index)

    def load_batch(indices, seeds):
        noise = tf.map_fn(lambda s: tf.random.stateless_normal((FEATURES,), s), seeds, fn_output_signature=tf.float32)
        return tf.gather(X, indices) + NOISE * noise, tf.gather(Y, indices)

    def noise_one_by_one(indices, epoch):
        seeds = sample_seeds(OPTIONS.seed, epoch, indices).tolist()
        words = [np.array([seed % 2**32, seed >> 32], np.uint32).astype(np.int32) for seed in seeds]
        return X[indices] + NOISE * np.stack([tf.random.stateless_normal((FEATURES,), word) for word in words])

    def loop(options, build, batched=False):
        keras.utils.clear_session()
        model, optimizer = build()
        optimizer = loop_adapter.distribute(optimizer, model)

        @tf.function(reduce_retracing=True)
        def train_step(x, y, weight):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x, training=True) - y) ** 2) * weight
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return loss

        with Run(options, world, loop_adapter, model, optimizer, SAMPLES) as run:
            loader = loop_adapter.Loader(run, load_batch if batched else load, batched=batched)
            for _ in run.epochs():
                assert len(loader) == run.steps_left_in_epoch
                for (x, y), weight in loader:
                    optimizer.learning_rate = run.learning_rate()
                    run.log(loss=train_step(x, y, weight))
                run.end_epoch()
        dp.gather(None)

    expected = losses_in_numpy(noise_one_by_one)
    loop(replace(OPTIONS, output=BASE / "loop"), linear, batched=True)
    check_losses("loop", losses(BASE / "loop"), expected)
    fit(world, replace(OPTIONS, output=BASE / "fit"), linear, lambda r: dp.tf_data(r, load))
    check_losses("fit", losses(BASE / "fit"), expected)
    if world.size == 2:
        check_resume("resume loop", lambda o: loop(o, with_dropout), dp.gather, steps=12, stop=8)

        def data(run):
            return dp.tf_data(run, load_batch, batched=True)

        check_resume("resume fit", lambda o: fit(world, o, with_dropout, data), dp.gather, steps=12, stop=8)


def main():
    world = dp.start(seed=5)
    check_batches(world)
    if dp.BACKEND == "tensorflow":
        check_tf_data(world)
    else:
        check_torch_data(world)
    if world.size == 1:
        mistakes(world)
    if world.rank == 0:
        print("all cases passed")
    dp.stop()


if __name__ == "__main__":
    main()

"""Synchronised BatchNormalization, run by every rank: batch_norm_keras.py tensorflow|keras [CASE …].

Against the closed form, and against one process, in the tensorflow adapter and in the keras adapter on both backends.
"""

import importlib
import os
import sys

import keras
import numpy as np

from tests.parallel.workers.batch_norm_common import BETA, EPSILON, GAMMA, SAMPLES, closed_form, part, samples
from tests.parallel.workers.keras_common import BACKEND, DEVICE, Steps, case, raises, run_cases
from toolkit.sharding import Sharding

ADAPTER, *NAMES = sys.argv[1:]
dp = importlib.import_module(f"toolkit.adapters.{ADAPTER}")
WORLD = dp.start(**DEVICE)
# Keras on torch makes float32 of float64 in this layer.
DTYPE, TOLERANCE = ("float64", 1e-12) if BACKEND == "tensorflow" else ("float32", 1e-5)


def layer(axis, shape, **options):
    norm = keras.layers.BatchNormalization(axis, epsilon=EPSILON, dtype=DTYPE, **options)
    norm.build(shape)
    if norm.scale:
        norm.gamma.assign(GAMMA)
    if norm.center:
        norm.beta.assign(BETA)
    return norm


def outputs_and_gradients(norm, x, d_y, mask=None):
    """Of a layer in training, for Σ d_y·y: {"y", "x", "gamma", "beta"}."""
    names = ["y", "x", *(v.name for v in norm.trainable_variables)]
    x, d_y = (keras.ops.convert_to_tensor(array, DTYPE) for array in (x, d_y))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function
        def found():
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = norm(x, training=True, mask=mask)
                loss = tf.reduce_sum(y * d_y)
            return [y, *tape.gradient(loss, [x, *(v.value for v in norm.trainable_variables)])]

        values = found()
    else:
        x.requires_grad_()
        mask = None if mask is None else keras.ops.convert_to_tensor(mask)
        y = norm(x, training=True, mask=mask)
        keras.ops.sum(y * d_y).backward()
        values = [y, x.grad, *(v.value.grad for v in norm.trainable_variables)]
        values = [value.detach() for value in values]
    return dict(zip(names, (np.asarray(keras.ops.convert_to_numpy(value)) for value in values), strict=True))


def check(axis, shape, masked=False, empty=False, tolerance=TOLERANCE, **options):
    x, d_y = samples(shape)
    mask = np.arange(SAMPLES * shape[1]).reshape(SAMPLES, shape[1]) % 3 > 0 if masked else None
    if masked:
        x[~mask], d_y[~mask] = 100.0, 0.0
    norm = layer(axis, shape, **options)
    affine = {"gamma": GAMMA, "beta": BETA} if norm.scale else {"gamma": np.ones(3), "beta": np.zeros(3)}
    expected = closed_form(x, d_y, axis, mask=mask, **affine)
    mine = part(WORLD, empty)
    own = None if mask is None else mask[mine]
    found = outputs_and_gradients(dp.synchronize_batch_norm(norm), x[mine], d_y[mine], own)
    expected |= {"y": expected["y"][mine], "x": expected["x"][mine]}
    for name in sorted(found.keys() & affine.keys()):  # in one order on all ranks
        found[name] = dp.average({"": found[name]})[""] * WORLD.size
    for name, old in (("mean", 0.0), ("variance", 1.0)):
        found[name] = (keras.ops.convert_to_numpy(getattr(norm, f"moving_{name}")) - 0.99 * old) / 0.01
    for name, array in found.items():
        error = 100 * tolerance if name in ("mean", "variance") else tolerance
        np.testing.assert_allclose(array, expected[name], error, 10 * error, err_msg=f"{name} {shape}")


@case
def equals_the_closed_form():
    for axis, shape in ((-1, (SAMPLES, 3)), (1, (SAMPLES, 3, 2, 2)), (-1, (SAMPLES, 2, 2, 3))):
        check(axis, shape)
    check(-1, (SAMPLES, 3), center=False, scale=False)


@case
def a_rank_without_samples_takes_part():
    check(-1, (SAMPLES, 4, 3), empty=True)


@case
def what_a_mask_leaves_out_counts_for_nothing():
    check(-1, (SAMPLES, 4, 3), masked=True, tolerance=max(TOLERANCE, 1e-7))  # Keras adds 1e-7 to the number of values


def model(synchronized):
    """Two branches that meet, as in ResNet, and a layer that is called twice."""
    keras.utils.set_random_seed(3)
    norm, twice = keras.layers.BatchNormalization, keras.layers.BatchNormalization(momentum=0.9)
    x = keras.Input((6, 6, 1))
    first = keras.layers.ReLU()(norm(momentum=0.9)(keras.layers.Conv2D(3, 3, use_bias=False)(x)))
    deep = twice(keras.layers.Conv2D(4, 3, 2, "same", use_bias=False)(first))
    deep = norm(momentum=0.9, renorm=True)(keras.layers.Conv2D(4, 3, 1, "same", use_bias=False)(keras.ops.relu(deep)))
    short = twice(keras.layers.Conv2D(4, 1, 2, use_bias=False)(first))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.ops.relu(deep + short))
    made = keras.Model(x, keras.layers.Dense(1)(pooled))
    return dp.synchronize_batch_norm(made) if synchronized else made


def whole(step):
    generator = np.random.default_rng(step)
    x = generator.normal(size=(SAMPLES, 6, 6, 1)).astype("float32")
    return x, x.sum((1, 2)), np.ones(SAMPLES, "float32")


def mine(step):
    x, y, _ = whole(step)
    part = Sharding(SAMPLES, SAMPLES, WORLD.size).part(np.arange(SAMPLES), WORLD.rank)
    return x[part.indices], y[part.indices], np.full(len(part.indices), part.weight, "float32")


def trained(synchronized, distributed=True, steps=20):
    """A model after so many steps, by `fit` or a loop of one's own; rates so small that rounding stays rounding."""
    net, optimizer = model(synchronized), keras.optimizers.SGD(0.01, momentum=0.9)
    # MPI adds up the gradients, where Horovod would answer slowly.
    optimizer = dp.distribute(optimizer, net, reducer="mpi") if distributed else optimizer
    data = mine if distributed else whole
    if ADAPTER == "keras":
        net.compile(optimizer, loss="mse")
        net.fit(Steps(data, steps), shuffle=False, verbose=0)
        return net
    import tensorflow as tf

    @tf.function(reduce_retracing=True)
    def step(x, y, weight):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(net(x, training=True) - y)) * weight[0]
        optimizer.apply(tape.gradient(loss, net.trainable_variables), net.trainable_variables)

    for number in range(steps):
        step(*map(tf.constant, data(number)))
    return net


def difference(one, other):
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return max(np.abs(a - b).max() for a, b in pairs if a.dtype.kind == "f")


@case
def training_is_that_of_one_worker():
    reference, net = trained(False, distributed=False), trained(True)
    assert difference(net, reference) < 1e-4, difference(net, reference)
    assert difference(trained(False), reference) > 1e-2, "the test can't fail"
    states = dp.gather({name: array.tobytes() for name, array in dp.export_state(net).items()})
    assert all(other == states[0] for other in states), "not the same bits on all ranks"
    if BACKEND == "tensorflow":
        assert os.environ["HOROVOD_CYCLE_TIME"] == "0.2", "each layer waits for Horovod"


@case
def layers_stay_what_they_are():
    net = model(False)
    architecture, variables, names = net.to_json(), net.variables, list(dp.export_state(net))
    assert dp.synchronize_batch_norm(dp.synchronize_batch_norm(net)) is net
    assert net.to_json() == architecture and list(dp.export_state(net)) == names
    assert all(a is b for a, b in zip(net.variables, variables, strict=True))
    path = f"/tmp/{os.getpid()}.keras"
    net.save(path)
    try:
        loaded = keras.models.load_model(path)
    finally:
        os.unlink(path)
    assert type(loaded.layers[2]) is keras.layers.BatchNormalization
    clone = keras.models.clone_model(net)
    clone.set_weights(loaded.get_weights())
    x, *_ = mine(0)
    found = [keras.ops.convert_to_numpy(m(x, training=True)) for m in (net, clone)]
    assert np.array_equal(*found), "a clone is synchronised too"


@case
def mistakes_get_one_clear_line():
    class Own(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return inputs

    raises(lambda: dp.synchronize_batch_norm("model"), "str", "keras.Model")
    raises(lambda: dp.synchronize_batch_norm(keras.layers.Dense(1)), "this Dense has no BatchNormalization layer")
    usual = keras.layers.BatchNormalization()
    both = keras.Sequential([keras.Input((2,)), usual, Own(name="own")])
    raises(lambda: dp.synchronize_batch_norm(both), "own is a", "call() of its own")
    assert type(usual) is keras.layers.BatchNormalization
    if BACKEND == "tensorflow" and WORLD.size > 1:
        net = dp.synchronize_batch_norm(keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()]))
        net.compile("sgd", "mse", jit_compile=True)
        raises(lambda: net.fit(np.ones((2, 3)), np.ones((2, 3)), verbose=0), "XLA", "jit_compile=False")


@case
def layers_within_a_module_are_found():
    if ADAPTER != "tensorflow":
        return
    import tensorflow as tf

    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            self.parts = {"block": [keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])]}

    module = dp.synchronize_batch_norm(Module())
    net = module.parts["block"][0]
    x, _ = samples((SAMPLES, 3))
    net(x[part(WORLD)], training=True)
    np.testing.assert_allclose(net.layers[0].moving_mean, 0.01 * x.mean(0), rtol=1e-5)


run_cases(dp, WORLD, NAMES)

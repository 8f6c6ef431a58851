"""Cases for the tensorflow adapter, run by every rank; the reference is the same loop on the whole batch."""

import sys

import keras
import numpy as np
import tensorflow as tf
from keras_common import (
    DEVICE,
    OPTIMIZERS,
    assert_close,
    batch,
    case,
    equal_on_all_ranks,
    half_precision,
    mine,
    new_model,
    new_optimizer,
    raises,
    run_cases,
    way,
    whole,
)

import toolkit.adapters.tensorflow as dp

WORLD = dp.start(seed=1, **DEVICE)
MINE = mine(WORLD)
OTHERS = WORLD.size > 1
EAGER = lambda function: function  # noqa: E731


class Plain(tf.Module):
    """Variables without Keras, and of one name."""

    def __init__(self, seed):
        super().__init__()
        generator = tf.random.Generator.from_seed(seed)
        self.layers = [tf.Variable(generator.normal(shape), name="w") for shape in ((4, 5), (5, 1))]
        self.unused = tf.Variable([1.0, 2.0], name="unused")

    def __call__(self, x):
        return tf.tanh(x @ self.layers[0]) @ self.layers[1]


class Words(tf.Module):
    """A table of which each step reads some rows, some of them twice."""

    def __init__(self, seed):
        super().__init__()
        self.table = tf.Variable(tf.random.Generator.from_seed(seed).normal((9, 3)), name="table")

    def __call__(self, x):
        rows = tf.argmax(x, axis=1)
        both = tf.gather(self.table, tf.stack([rows, tf.argmin(x, axis=1)], axis=1))
        return tf.reduce_sum(both, axis=(1, 2))[:, None]


def train(model, optimizer, part, wrap=tf.function, steps=4):
    @wrap
    def step(x, y, weight):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(weight * tf.reduce_mean(tf.square(tf.cast(model(x), y.dtype) - y), axis=1))
            if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
                loss = optimizer.scale_loss(loss)
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )

    for number in range(steps):
        step(*(tf.constant(a) for a in part(number)))


def distributed(optimizer, model, **options):
    optimizer = dp.distribute(optimizer, model, **options)
    dp.broadcast_state(model, optimizer)
    return model, optimizer


@case
def control_without_distribute_ranks_part():
    model, optimizer = new_model(), new_optimizer("SGD")
    train(model, optimizer, MINE)
    assert not OTHERS or not equal_on_all_ranks(dp, model, optimizer), "the data can't show what averaging does"


@case
def every_optimizer_and_kind_of_loop_equals_one_process():
    loops = [
        ("Adam", EAGER),
        ("LossScaleOptimizer", EAGER),
        ("MultiOptimizer", EAGER),
        *((n, tf.function) for n in OPTIMIZERS),
    ]
    for name, wrap in loops:
        reference, plain = new_model(), new_optimizer(name)
        train(reference, plain, whole, wrap)
        model, optimizer = distributed(new_optimizer(name), new_model(WORLD.rank))
        train(model, optimizer, MINE, wrap)
        assert equal_on_all_ranks(dp, model, optimizer)
        assert_close(dp, (model, optimizer), (reference, plain))


@case
def plain_modules_train():
    for make in (Plain, Words):
        for name in ("SGD", "Adam", "Ftrl"):
            for wrap in (EAGER, tf.function):
                reference, plain = make(0), new_optimizer(name)
                for number in range(4):  # dense gradients: Keras takes rows that are there twice wrongly
                    x, y, _ = whole(number)
                    with tf.GradientTape() as tape:
                        loss = tf.reduce_mean(tf.square(reference(x) - y))
                    grads = tape.gradient(loss, reference.trainable_variables)
                    dense = [None if g is None else tf.convert_to_tensor(g) for g in grads]
                    plain.apply(dense, reference.trainable_variables)
                model, optimizer = distributed(new_optimizer(name), make(WORLD.rank))
                train(model, optimizer, MINE, wrap)
                assert equal_on_all_ranks(dp, model, optimizer)
                assert_close(dp, (model, optimizer), (reference, plain))


@case
def options_reach_keras():
    reference, plain = new_model(), new_optimizer("SGD", global_clipnorm=0.1)
    train(reference, plain, whole)
    model, optimizer = distributed(new_optimizer("SGD"), new_model(WORLD.rank), clip_norm=0.1, accumulation_steps=2)
    train(model, optimizer, mine(WORLD, 2), steps=8)
    assert equal_on_all_ranks(dp, model, optimizer)
    assert_close(dp, (model, None), (reference, None))
    for dtype in ("float64", "bfloat16", "float16"):
        keras.config.set_dtype_policy(dtype)
        model, optimizer = distributed(new_optimizer("SGD"), new_model(WORLD.rank), compression="fp16")
        train(model, optimizer, lambda n, d=dtype: tuple(tf.cast(a, d) for a in MINE(n)))
        assert equal_on_all_ranks(dp, model, optimizer)
        model, optimizer = distributed(new_optimizer("SGD"), new_model(WORLD.rank))
        train(model, optimizer, lambda n, d=dtype: tuple(tf.cast(a, d) for a in MINE(n)))
        assert equal_on_all_ranks(dp, model, optimizer)
        state = dp.export_state(model, optimizer)
        assert state["model/dense/kernel"].dtype == ("float32" if dtype == "bfloat16" else dtype)
        other, fresh = new_model(5), new_optimizer("SGD")
        dp.import_state(other, fresh, state)
        assert dp.digest(other, fresh) == dp.digest(model, optimizer)
    keras.config.set_dtype_policy("float32")


@case
def ranks_may_trace_anew_at_different_steps():
    """Rank 0's batches change their shape, so it traces at each step, in scopes of other names."""
    model, optimizer = distributed(new_optimizer("SGD"), Words(WORLD.rank))
    traced = []

    def part(step):
        x, y = batch(step, 1 + (step % 5 if WORLD.rank == 0 else 0))
        return x, y, np.ones(len(x), "float32")

    def count(function):
        @tf.function
        def counted(*args):
            traced.append(1)
            with tf.name_scope(f"{WORLD.rank}.{len(traced)}"):
                return function(*args)

        return counted

    train(model, optimizer, part, count, steps=8)
    assert equal_on_all_ranks(dp, model, optimizer)
    assert len(traced) == (5 if WORLD.rank == 0 else 1)


@case
def two_optimizers_in_one_function_do_not_mix():
    one, other = Plain(WORLD.rank), Words(WORLD.rank)
    _, first = distributed(new_optimizer("SGD"), one)
    _, second = distributed(new_optimizer("Adam"), other)

    @tf.function
    def step(x, y):
        with tf.GradientTape(persistent=True) as tape:
            a, b = tf.reduce_mean(tf.square(one(x) - y)), tf.reduce_mean(tf.square(other(x) - y))
        first.apply(tape.gradient(a, one.layers), one.layers)
        second.apply(tape.gradient(b, other.trainable_variables), other.trainable_variables)
        first.apply(tape.gradient(a, one.layers), one.layers)  # once more in the same graph

    for number in range(3):
        step(*(tf.constant(a) for a in MINE(number)[:2]))
    assert equal_on_all_ranks(dp, one, first) and equal_on_all_ranks(dp, other, second)
    assert int(first.iterations) == 6


@case
def a_gradient_missing_on_some_ranks_is_zero_there():
    for wrap in (EAGER, tf.function):
        for everywhere in (False, True):
            model, optimizer = distributed(new_optimizer("SGD", weight_decay=0.5), Words(WORLD.rank))
            dense, other = tf.Variable([2.0]), tf.Variable([1.0])
            before = model.table.numpy()

            @wrap
            def step():
                missing = everywhere or WORLD.rank == 0  # noqa: B023
                rows = tf.IndexedSlices(tf.ones((2, 3)), [WORLD.rank, WORLD.rank], dense_shape=[9, 3])
                grads = [None, None] if missing else [rows, tf.constant([4.0])]
                optimizer.apply([*grads, tf.constant([1.0])], [model.table, dense, other])  # noqa: B023

            step()
            n, change = WORLD.size, model.table.numpy() - before
            assert equal_on_all_ranks(dp, model, optimizer)
            assert np.isclose(other.numpy()[0], 1 - 0.02 * 1.5)
            if everywhere or n == 1:
                assert (change == 0).all() and dense.numpy()[0] == 2.0
            else:
                expected = -0.02 * 0.5 * before
                expected[1:n] -= 0.02 * 2 / n
                np.testing.assert_allclose(change, expected, rtol=1e-4, atol=1e-6)
                assert np.isclose(dense.numpy()[0], 2 - 0.02 * (4 * (n - 1) / n + 0.5 * 2))


@case
def overflow_on_one_rank_makes_all_skip():
    for wrap in (EAGER, tf.function):
        model, optimizer = distributed(new_optimizer("LossScaleOptimizer"), new_model())

        def part(step):
            x, y, weight = MINE(step)
            return (x * np.inf if step == 1 and WORLD.rank == 0 else x), y, weight

        train(model, optimizer, part, wrap)
        assert equal_on_all_ranks(dp, model, optimizer)
        assert int(optimizer.iterations) == 3 and float(optimizer.dynamic_scale) == 8.0


@case
def mixed_precision_unscales_averages_clips_and_steps():
    """As float32 on the whole batch, to the digits of half precision; what float16 can't hold on a rank, all skip."""

    def overflowing(step):
        x, y, weight = MINE(step)
        return (x * 1e5 if step == 1 and WORLD.rank == WORLD.size - 1 else x), y, weight

    reference, plain = half_precision("float32")
    before = reference.get_weights()
    train(reference, plain, whole, steps=3)
    expected = way(reference, before)
    assert np.isclose(np.linalg.norm(expected), 3 * 0.05, rtol=0.2), "the clipping shows nothing"
    for policy in ("mixed_float16", "mixed_bfloat16"):
        model, optimizer = half_precision(policy)
        optimizer = dp.distribute(optimizer, model)
        train(model, optimizer, MINE, steps=3)
        assert equal_on_all_ranks(dp, model, optimizer)
        distance = np.linalg.norm(way(model, before) - expected) / np.linalg.norm(expected)
        assert distance < 0.03, (policy, distance)
    model, optimizer = half_precision("mixed_float16")
    optimizer = dp.distribute(optimizer, model)
    train(model, optimizer, overflowing)
    assert equal_on_all_ranks(dp, model, optimizer)
    assert int(optimizer.iterations) == 3 and float(optimizer.dynamic_scale) == 512.0
    assert np.isfinite(model.get_weights()[0]).all()


@case
def what_a_function_can_not_hold_is_refused():
    model, optimizer = distributed(new_optimizer("SGD"), new_model())
    xla = lambda function: tf.function(function, jit_compile=True)  # noqa: E731
    within, around = lambda function: tf.function(xla(function)), lambda function: xla(tf.function(function))
    for compiled in (xla, within, around):
        raises(lambda wrap=compiled: train(model, optimizer, MINE, wrap), "jit_compile=False")
    module, optimizer = distributed(new_optimizer("SGD"), Plain(0))
    train(module, optimizer, MINE)
    variables = list(module.trainable_variables)

    @tf.function
    def other_use():
        optimizer.apply([tf.ones(v.shape) for v in variables], variables)

    raises(other_use, "unused")


@case
def state_of_modules_round_trips():
    model, optimizer = distributed(new_optimizer("Adam"), Plain(0))
    train(model, optimizer, MINE)
    state = dp.export_state(model, optimizer)
    assert [n for n in state if n.startswith("model/")] == ["model/w", "model/w#2", "model/unused"]
    other, fresh = Plain(5), new_optimizer("Adam")
    dp.import_state(other, fresh, state)
    assert dp.digest(other, fresh) == dp.digest(model, optimizer)
    raises(lambda: dp.import_state(other, fresh, state | {"model/w": np.zeros((1, 1), "float32")}), "model/w is")
    assert dp.digest(other, fresh) == dp.digest(model, optimizer)


@case
def averages_are_weighted():
    r, n = WORLD.rank, WORLD.size
    found = dp.average({"a": float(r), "b": np.array([[1.0, r]])}, weight=r + 1)
    assert np.isclose(found["a"], np.average(np.arange(n), weights=np.arange(1, n + 1)))
    assert np.allclose(found["b"], [[1.0, found["a"]]]) and isinstance(found["a"], float)
    assert dp.gather({"rank": r}) == [{"rank": i} for i in range(n)]


@case
def mistakes_get_one_clear_line():
    model, adam = new_model(), new_optimizer("Adam")
    raises(lambda: dp.distribute("adam", model), "'adam'", "keras.optimizers.Optimizer")
    raises(lambda: dp.distribute(adam, None), "NoneType")
    raises(lambda: dp.distribute(adam, model, clip_norm=-1.0), "clip_norm is -1.0")
    dp.distribute(adam, Plain(0))
    raises(lambda: dp.distribute(adam, model), "distributed already")
    raises(lambda: dp.broadcast_state(keras.Sequential([keras.layers.Dense(1)])), "no variables yet")


if __name__ == "__main__":
    run_cases(dp, WORLD, sys.argv[1:])

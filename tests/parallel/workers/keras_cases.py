"""Cases for the keras adapter, run by every rank on either backend.

The reference is plain Keras on the whole batch, in the same process.
"""

import functools
import json
import random
import sys
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
from keras_common import (
    BACKEND,
    DEVICE,
    OPTIMIZERS,
    Steps,
    assert_close,
    batch,
    case,
    equal_on_all_ranks,
    fit,
    half_precision,
    mine,
    new_model,
    new_optimizer,
    raises,
    run_cases,
    way,
    whole,
)

import toolkit.adapters.keras as dp

if BACKEND == "tensorflow":
    import tensorflow as tf
else:
    import torch

WORLD = dp.start(seed=1, **DEVICE)
TENSORFLOW = BACKEND == "tensorflow"
MINE = mine(WORLD)
OTHERS = WORLD.size > 1


def distributed(optimizer, seed=None, model=None, **options):
    """A model that begins as rank 0's, and its distributed optimizer."""
    model = model or new_model(WORLD.rank if seed is None else seed)
    optimizer = dp.distribute(optimizer, model, **options)
    dp.broadcast_state(model, optimizer)
    return model, optimizer


def check_against_one_process(make, tolerance=2e-5, compiled=None, steps=4, **options):
    """Train with `make()` distributed on parts and alone on whole batches, and compare."""
    reference, plain = new_model(), make()
    fit(reference, plain, whole, steps, compiled=compiled)
    model, optimizer = distributed(make(), **options)
    fit(model, optimizer, MINE, steps, compiled=compiled)
    assert equal_on_all_ranks(dp, model, optimizer)
    assert_close(dp, (model, optimizer), (reference, plain), tolerance)
    return reference


def refit(model, **options):
    model.fit(Steps(MINE), shuffle=False, verbose=0, **options)


def gradients(model, x, y, weight):
    if TENSORFLOW:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y)) * weight
        return tape.gradient(loss, model.trainable_variables)
    model.zero_grad()
    loss = torch.mean(torch.square(model(x) - keras.ops.convert_to_tensor(y))) * float(weight)
    loss.backward()
    return [v.value.grad for v in model.trainable_variables]


def apply_steps(model, optimizer, part=MINE, steps=2):
    for step in range(steps):
        x, y, weight = part(step)
        optimizer.apply(gradients(model, x, y, weight[0]), model.trainable_variables)


@case
def control_without_distribute_ranks_part():
    model, optimizer = new_model(), new_optimizer("SGD")
    fit(model, optimizer, MINE)
    assert not OTHERS or not equal_on_all_ranks(dp, model, optimizer), "the data can't show what averaging does"


USUAL = ("SGD", "Adam")


@case
def usual_optimizers_equal_one_process():
    equal_one_process({name: OPTIMIZERS[name] for name in USUAL})


@case
def every_other_optimizer_equals_one_process():
    assert len(OPTIMIZERS) >= 14
    equal_one_process({name: kind for name, kind in OPTIMIZERS.items() if name not in USUAL})


def equal_one_process(optimizers):
    for name, kind in optimizers.items():
        optimizer = new_optimizer(name)
        config = optimizer.get_config()
        assert isinstance(dp.distribute(optimizer, new_model()), kind)
        assert optimizer.get_config() == config
        check_against_one_process(lambda name=name: new_optimizer(name))


@case
def options_act_on_averaged_gradients():
    plain = new_model()
    fit(plain, new_optimizer("SGD"), whole)
    for options in (
        {"clipnorm": 0.1},
        {"global_clipnorm": 0.1},
        {"clipvalue": 0.05},
        {"weight_decay": 0.1},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 64.0, "global_clipnorm": 0.1},
    ):
        reference = check_against_one_process(lambda options=options: new_optimizer("SGD", **options))
        assert not np.allclose(plain.get_weights()[0], reference.get_weights()[0]), f"{options} change nothing"


@case
def options_of_distribute_are_keras_own():
    make = lambda: new_optimizer("Adam")  # noqa: E731
    for ours, keras_own in (({"clip_norm": 0.1}, {"global_clipnorm": 0.1}), ({"accumulation_steps": 2}, {})):
        reference = new_model()
        plain = new_optimizer("Adam", **keras_own)
        fit(reference, plain, whole)
        passes = ours.get("accumulation_steps", 1)
        model, optimizer = distributed(make(), **ours)
        fit(model, optimizer, mine(WORLD, passes), 4 * passes)
        assert equal_on_all_ranks(dp, model, optimizer)
        assert_close(dp, (model, None), (reference, None))
    inner = keras.optimizers.SGD(0.1)
    dp.distribute(keras.optimizers.LossScaleOptimizer(inner), new_model(), clip_norm=0.5)
    assert inner.global_clipnorm == 0.5


@case
def ways_to_train_are_the_same():
    reference, plain = new_model(), new_optimizer("Adam")
    fit(reference, plain, whole)

    class Own(keras.Sequential):
        def train_step(self, data):
            x, y, weight = data
            grads = gradients(self, x, y, weight[0])
            self.optimizer.apply(grads, self.trainable_variables)
            return {"calls": keras.ops.sum(weight)}

    model, optimizer = distributed(new_optimizer("Adam"), model=new_model(WORLD.rank, Own))
    fit(model, optimizer, MINE)
    assert equal_on_all_ranks(dp, model, optimizer)
    assert_close(dp, (model, None), (reference, None))
    if TENSORFLOW:
        ways = [{"run_eagerly": True}, {"steps_per_execution": 3}, {"jit_compile": "auto"}]
    else:
        ways = [{"jit_compile": True}]
    if not TENSORFLOW:  # what Dynamo makes of the step is tested; to compile that takes a minute
        torch.compile = functools.partial(torch.compile, backend="eager")
    for compiled in ways:
        check_against_one_process(lambda: new_optimizer("Adam"), compiled=compiled, steps=3)
    for apply in ("apply", "apply_gradients", "built"):
        model, optimizer = distributed(new_optimizer("Adam"))
        for step in range(4):
            x, y, weight = MINE(step)
            grads = gradients(model, x, y, weight[0])
            if apply == "apply":
                optimizer.apply(iter(grads), iter(model.trainable_variables))
            elif apply == "apply_gradients":
                optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
            else:
                optimizer.build(model.trainable_variables)
                optimizer.apply(grads)
        if apply != "built":
            assert_close(dp, (model, optimizer), (reference, plain))
        assert equal_on_all_ranks(dp, model, optimizer)


@case
def saving_and_loading_keep_the_plain_optimizer():
    with tempfile.TemporaryDirectory() as folder:
        for name in OPTIMIZERS:
            model, optimizer = distributed(new_optimizer(name))
            model.compile(optimizer, loss="mse")
            apply_steps(model, optimizer)
            model.save(Path(folder) / "model.keras")
            loaded = keras.models.load_model(Path(folder) / "model.keras")
            assert type(loaded.optimizer) is type(new_optimizer(name)), name
            if name != "MultiOptimizer":  # Keras 3.15 itself loses its slots: the inner ones are unbuilt when it loads
                assert_close(dp, (loaded, loaded.optimizer), (model, optimizer), 0)
        registered = keras.saving.register_keras_serializable("tests")(type("Own", (keras.optimizers.SGD,), {}))
        model, optimizer = distributed(registered(0.01, momentum=0.5))
        fit(model, optimizer, MINE)
        model.save(Path(folder) / "model.keras")
        loaded = keras.models.load_model(Path(folder) / "model.keras")
        assert type(loaded.optimizer) is registered
    again = dp.distribute(loaded.optimizer, loaded)
    refit(loaded)
    refit(model)
    assert equal_on_all_ranks(dp, loaded, again)
    assert_close(dp, (loaded, again), (model, optimizer), 0)


@case
def distribute_after_fit_takes_effect():
    model, optimizer = new_model(), new_optimizer("SGD")
    fit(model, optimizer, whole)
    dp.distribute(optimizer, model)
    refit(model)
    assert equal_on_all_ranks(dp, model, optimizer)


@case
def xla_is_refused_or_off():
    if not TENSORFLOW:
        return
    model, optimizer = distributed(new_optimizer("SGD"))
    raises(lambda: fit(model, optimizer, MINE, compiled={"jit_compile": True}), "jit_compile=False")
    callbacks = [dp.BroadcastState()]
    raises(
        lambda: fit(model, optimizer, MINE, compiled={"jit_compile": True}, callbacks=callbacks),
        "jit_compile",
    )
    model, optimizer = new_model(), new_optimizer("SGD")
    model.compile(optimizer, loss="mse", jit_compile=True)
    raises(lambda: dp.distribute(optimizer, model), "jit_compile=True")
    list_devices = tf.config.list_physical_devices
    tf.config.list_physical_devices = lambda *_: [tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
    try:
        assert new_model()._resolve_auto_jit_compile(), "auto means no XLA here: the test shows nothing"
        check_against_one_process(lambda: new_optimizer("SGD"))
        model, optimizer = new_model(), new_optimizer("SGD")
        model.compile(optimizer, loss="mse")
        assert model.jit_compile
        with warnings.catch_warnings(record=True) as caught:
            dp.distribute(optimizer, model)
        assert "XLA is off" in str(caught[0].message)
        refit(model)
        assert equal_on_all_ranks(dp, model, optimizer)
        model.jit_compile, model.train_function = True, None
        raises(lambda: refit(model), "jit_compile=False")
        other = new_model()
        raises(lambda: fit(other, optimizer, MINE), "jit_compile=False")
        plain = new_model()
        plain.compile(new_optimizer("SGD"), loss="mse")
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
            plain.save(Path(folder) / "model.keras")  # with the jit_compile=True that auto had become
            loaded = keras.models.load_model(Path(folder) / "model.keras")
            assert loaded.jit_compile
            optimizer = dp.distribute(loaded.optimizer, loaded)
        assert "XLA is off" in str(caught[-1].message)
        refit(loaded)
        loaded.compile(optimizer, loss="mse")
        refit(loaded)
        assert equal_on_all_ranks(dp, loaded, optimizer)
    finally:
        tf.config.list_physical_devices = list_devices


@case
def overflow_on_one_rank_makes_all_skip():
    def overflowing(step):
        x, y, weight = MINE(step)
        return (x * np.inf if step == 1 and WORLD.rank == 0 else x), y, weight

    model, optimizer = distributed(new_optimizer("LossScaleOptimizer"))
    fit(model, optimizer, overflowing)
    assert equal_on_all_ranks(dp, model, optimizer)
    assert int(optimizer.iterations) == 3
    assert np.isfinite(model.get_weights()[0]).all()
    # Doubled after two finite steps, halved by an overflow: 8 -> 8, 4, 4, 8.
    assert float(optimizer.dynamic_scale) == 8.0


@case
def mixed_precision_averages_outermost():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, optimizer = distributed(new_optimizer("Adam"))
        raises(lambda: model.compile(optimizer, loss="mse"), "LossScaleOptimizer(optimizer)", "auto_scale_loss")
        check_against_one_process(
            lambda: keras.optimizers.LossScaleOptimizer(new_optimizer("Adam"), initial_scale=8.0),
            tolerance=5e-2,
        )
        model, optimizer = distributed(new_optimizer("SGD"))
        fit(model, optimizer, MINE, compiled={"auto_scale_loss": False})
        assert equal_on_all_ranks(dp, model, optimizer)
    finally:
        keras.config.set_dtype_policy("float32")


@case
def mixed_precision_unscales_averages_clips_and_steps():
    """As float32 on the whole batch, to the digits of half precision; what float16 can't hold on a rank, all skip."""

    def overflowing(step):
        x, y, weight = MINE(step)
        return (x * 1e5 if step == 1 and WORLD.rank == WORLD.size - 1 else x), y, weight

    reference, plain = half_precision("float32")
    before = reference.get_weights()
    fit(reference, plain, whole, 3)
    expected = way(reference, before)
    assert np.isclose(np.linalg.norm(expected), 3 * 0.05, rtol=0.2), "the clipping shows nothing"
    for policy in ("mixed_float16", "mixed_bfloat16"):
        model, optimizer = half_precision(policy)
        optimizer = dp.distribute(optimizer, model)
        fit(model, optimizer, MINE, 3)
        assert equal_on_all_ranks(dp, model, optimizer)
        distance = np.linalg.norm(way(model, before) - expected) / np.linalg.norm(expected)
        assert distance < 0.03, (policy, distance)
    model, optimizer = half_precision("mixed_float16")
    optimizer = dp.distribute(optimizer, model)
    fit(model, optimizer, overflowing)
    assert equal_on_all_ranks(dp, model, optimizer)
    assert int(optimizer.iterations) == 3 and float(optimizer.dynamic_scale) == 512.0
    assert np.isfinite(model.get_weights()[0]).all()


@case
def embeddings_with_repeated_and_absent_rows():
    def words(seed):
        keras.utils.set_random_seed(seed)
        layers = [keras.layers.Embedding(9, 3), keras.layers.Flatten(), keras.layers.Dense(1)]
        return keras.Sequential([keras.Input((2,), dtype="int32"), *layers])

    ids = np.array([[1, 1], [2, 2], [2, 1], [1, 3], [8, 8], [7, 8], [2, 7]], "int32")  # 0, 4, 5, 6 are absent

    def part(step):
        x, y, weight = MINE(step)
        indices = [np.flatnonzero((batch(step)[0] == row).all(1))[0] for row in x]
        return ids[indices], y, weight

    for name in ("SGD", "Adam", "Ftrl", "Muon"):
        for options in ({}, {"global_clipnorm": 0.1})[: 2 if name == "SGD" else 1]:
            reference, plain = words(0), new_optimizer(name, **options)
            for step in range(4):
                grads = gradients(reference, ids, batch(step)[1], 1.0)
                if TENSORFLOW:  # plain Keras 3.15 gets rows that are there twice wrong: a² + b² for (a + b)²
                    grads = [tf.convert_to_tensor(g) for g in grads]
                plain.apply(grads, reference.trainable_variables)
            model, optimizer = distributed(new_optimizer(name, **options), model=words(WORLD.rank))
            fit(model, optimizer, part)
            assert equal_on_all_ranks(dp, model, optimizer)
            assert_close(dp, (model, optimizer), (reference, plain))


@case
def a_gradient_missing_on_some_ranks_is_zero_there():
    for everywhere in (False, True):
        model, optimizer = distributed(new_optimizer("SGD", weight_decay=0.5))
        before = model.get_weights()
        grads = gradients(model, *batch(0), 1.0)
        first = keras.ops.convert_to_numpy(grads[0])
        if everywhere or WORLD.rank == 0:
            grads[0] = None
        optimizer.apply(grads, model.trainable_variables)
        assert equal_on_all_ranks(dp, model, optimizer)
        change = model.get_weights()[0] - before[0]
        if everywhere or not OTHERS:
            assert (change == 0).all(), "a variable without any gradient was updated (by weight decay)"
        else:
            kept = (WORLD.size - 1) / WORLD.size
            np.testing.assert_allclose(change, -0.02 * (kept * first + 0.5 * before[0]), rtol=1e-4, atol=1e-6)


@case
def broadcast_covers_statistics_and_slots_but_no_random_states():
    def make(seed):
        keras.utils.set_random_seed(seed)
        layers = [
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=seed),
            keras.layers.Dense(1),
        ]
        return keras.Sequential([keras.Input((4,)), *layers])

    model, optimizer = make(WORLD.rank), new_optimizer("Adam")
    fit(model, optimizer, MINE)  # each rank for itself
    assert not OTHERS or not equal_on_all_ranks(dp, model, optimizer)
    before, local_before = dp.export_state(model, optimizer), dp.export_local(model)
    dp.broadcast_state(model, optimizer)
    after, local_after = dp.export_state(model, optimizer), dp.export_local(model)
    first = dp.gather(before)[0]
    assert "moving_mean" in str(list(after)) and "seed_generator" not in str(list(after))
    for name, array in after.items():
        assert (array == first[name]).all(), name
    assert [n for n in local_before if "seed_generator" in n] == ["random/seed_generator/seed_generator_state"]
    for name, array in local_after.items():
        assert name.startswith("model/") or (array == local_before[name])[~np.isnan(array)].all(), name
    assert [n.split("/")[-1] for n in after if n.startswith("model/") and n not in dp.digest(model)] == [
        "moving_mean",
        "moving_variance",
    ]
    if WORLD.rank > 0:
        optimizer = new_optimizer("Adam")  # not built here, built on rank 0
    dp.broadcast_state(model, optimizer)
    assert equal_on_all_ranks(dp, model, optimizer)


@case
def callback_broadcasts_before_the_first_batch():
    reference, plain = new_model(), new_optimizer("Adam")
    fit(reference, plain, whole)
    model = new_model(WORLD.rank)
    optimizer = dp.distribute(new_optimizer("Adam"), model)
    fit(model, optimizer, MINE, callbacks=[dp.BroadcastState()])
    assert_close(dp, (model, optimizer), (reference, plain))
    with tempfile.TemporaryDirectory() as folder:
        fit(reference, plain, lambda step: whole(step + WORLD.rank))  # another checkpoint on each rank
        reference.save(Path(folder) / "model.keras")
        model = keras.models.load_model(Path(folder) / "model.keras")
    for callback in (dp.BroadcastState(), dp.MetricAverage()):
        raises(lambda callback=callback: refit(model, callbacks=[callback]), "plain Adam", "after load_model()")
    dp.distribute(model.optimizer, model)
    refit(model, callbacks=[dp.BroadcastState()])
    assert equal_on_all_ranks(dp, model, model.optimizer)
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    raises(lambda: dp.broadcast_state(unbuilt), "keras.Input")


@case
def metrics_are_those_over_all_samples():
    seen = []

    class Seen(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            seen.append(dict(logs))

    def share(step):  # shares of very different size, in every rank as many batches
        x, y = batch(step, 20)
        first = WORLD.rank * 3
        return x[first : None if WORLD.rank == WORLD.size - 1 else first + 3], y[first:][: len(x)]

    def part(step):
        x, _ = share(step)
        y = batch(step, 20)[1][WORLD.rank * 3 :][: len(x)]
        return x, (y > 1).astype("float32"), np.linspace(0, 1, len(x), dtype="float32")

    def everything(step):
        parts = dp_parts[step % 3]
        return tuple(np.concatenate([p[i] for p in parts]) for i in range(3))

    dp_parts = [dp.gather(part(step)) for step in range(3)]
    compiled = {
        "metrics": ["mae", keras.metrics.AUC(), keras.metrics.Precision(), keras.metrics.R2Score()],
        "weighted_metrics": ["binary_accuracy", keras.metrics.RootMeanSquaredError()],
    }
    plateau = lambda: keras.callbacks.ReduceLROnPlateau(monitor="val_loss", patience=0, min_delta=10)  # noqa: E731
    frozen = new_model(WORLD.rank * 0)
    frozen.trainable = False
    options = {"validation_data": Steps(lambda step: part(step + 1), 2), "validation_freq": 2, "epochs": 6}
    optimizer = dp.distribute(new_optimizer("SGD"), frozen)
    fit(
        frozen,
        optimizer,
        part,
        3,
        compiled=compiled,
        callbacks=[dp.MetricAverage(), plateau(), Seen()],
        **options,
    )
    found, seen[:] = list(seen), []
    options["validation_data"] = Steps(lambda step: everything(step + 1), 2)
    reference = new_model()
    reference.trainable = False
    for m in compiled["metrics"] + compiled["weighted_metrics"]:
        getattr(m, "reset_state", lambda: None)()
    fit(
        reference,
        new_optimizer("SGD"),
        everything,
        3,
        compiled=compiled,
        callbacks=[plateau(), Seen()],
        **options,
    )
    assert len(found) == len(seen) == 6 and "val_loss" in found[1] and "val_loss" not in found[0]
    for one, other in zip(found, seen, strict=True):
        assert {k.rstrip("_0123456789") for k in one} == {k.rstrip("_0123456789") for k in other}
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)
    assert all(logs == found for logs in dp.gather(found))
    assert found[-1]["learning_rate"] < found[0]["learning_rate"]


@case
def every_metric_of_keras_adds_up_over_ranks():
    generator = np.random.default_rng(0)
    y = generator.integers(0, 6, 30)
    probabilities = generator.dirichlet(np.ones(6), 30).astype("float32")
    one_hot = np.eye(6, dtype="float32")[y]
    special = {"MeanIoU": {"num_classes": 6}, "IoU": {"num_classes": 6, "target_class_ids": [0]}}
    special |= {name: {"num_classes": 6} for name in ("OneHotMeanIoU",)}
    special |= {"OneHotIoU": {"num_classes": 6, "target_class_ids": [0]}, "BinaryIoU": {}}
    special |= {name: {"recall": 0.5} for name in ("PrecisionAtRecall",)}
    special |= {"RecallAtPrecision": {"precision": 0.5}, "SensitivityAtSpecificity": {"specificity": 0.5}}
    special |= {"SpecificityAtSensitivity": {"sensitivity": 0.5}}
    checked = 0
    for name in dir(keras.metrics):
        kind = getattr(keras.metrics, name)
        if not (isinstance(kind, type) and issubclass(kind, keras.metrics.Metric)):
            continue
        if name in ("Metric", "MeanMetricWrapper"):
            continue
        metric = kind(**special.get(name, {}))
        sparse = "Sparse" in name or name in ("MeanIoU", "IoU")
        predicted = probabilities.argmax(1) if name in ("MeanIoU", "IoU") else probabilities
        truth = y if sparse else one_hot
        data = (predicted,) if name in ("Mean", "Sum") else (truth, predicted)
        metric.update_state(*data)
        expected = keras.ops.convert_to_numpy(metric.result())
        states = []
        for half in (slice(0, 7), slice(7, None)):
            metric.reset_state()
            metric.update_state(*(d[half] for d in data))
            states.append([keras.ops.convert_to_numpy(v) for v in metric.variables])
        for v, a, b in zip(metric.variables, *states, strict=True):
            assert v.aggregation == "sum", (name, v.path)
            v.assign(a + b)
        np.testing.assert_allclose(keras.ops.convert_to_numpy(metric.result()), expected, rtol=1e-4, err_msg=name)
        checked += 1
    assert checked > 40, checked


@case
def warmup_is_a_function_of_the_step():
    rates = []

    class Seen(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    model, optimizer = distributed(new_optimizer("LossScaleOptimizer"))
    callbacks = [dp.LearningRateWarmup(0.8, 6, 0.25), Seen()]
    fit(model, optimizer, MINE, steps=2, callbacks=callbacks)
    fit(model, optimizer, MINE, steps=3, epochs=2, callbacks=callbacks)  # goes on where it stood
    optimizer.learning_rate = 0.1
    refit(model, callbacks=callbacks)
    np.testing.assert_allclose(rates, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8] + [0.1] * 4, rtol=1e-6)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    for optimizer in (
        keras.optimizers.SGD(schedule),
        keras.optimizers.SGD(lambda: 0.1),
        new_optimizer("MultiOptimizer"),
    ):
        model, optimizer = distributed(optimizer)
        raises(lambda o=optimizer, m=model: fit(m, o, MINE, callbacks=callbacks), "learning rate")


@case
def state_round_trips_by_stable_names():
    model, optimizer = distributed(new_optimizer("Adam"))
    fit(model, optimizer, MINE)
    state = dp.export_state(model, optimizer)
    other, fresh = new_model(5), new_optimizer("Adam")
    dp.import_state(other, fresh, state)
    assert dp.digest(other, fresh) == dp.digest(model, optimizer)
    assert list(dp.export_state(other, fresh)) == list(state)
    for bad in ({k: v for k, v in state.items() if "velocity" not in k}, state | {"model/more": np.zeros(1)}):
        before = dp.digest(model, optimizer)
        raises(lambda bad=bad: dp.import_state(model, optimizer, bad), "does not fit")
        assert dp.digest(model, optimizer) == before
    unbuilt = new_optimizer("Adam")
    dp.import_state(other, unbuilt, dp.export_state(model, new_optimizer("Adam")))
    assert not unbuilt.built
    if WORLD.rank == 0:
        print("names", json.dumps(list(state)), flush=True)
    for name in OPTIMIZERS:
        model, optimizer = distributed(new_optimizer(name))
        apply_steps(model, optimizer)
        other, fresh = new_model(5), new_optimizer(name)
        dp.import_state(other, fresh, dp.export_state(model, optimizer))
        assert dp.digest(other, fresh) == dp.digest(model, optimizer), name


@case
def import_refuses_each_misfit_and_changes_nothing():
    model, optimizer = distributed(new_optimizer("Adam"))
    apply_steps(model, optimizer)
    saved = dp.export_state(model, optimizer)
    slot = "optimizer/dense/kernel/momentum"
    misfits = {
        "wrong shape deep in the optimizer": (saved | {slot: np.zeros((4, 6), "f4")}, slot),
        "another dtype": (saved | {slot: saved[slot].astype("f8")}, slot),
        "an array for a number": (saved | {"optimizer/iteration": np.zeros(2, "i4")}, "optimizer/iteration"),
        "an extra tensor": (saved | {"optimizer/dense/kernel/more": np.zeros(3, "f4")}, "dense/kernel/more"),
        "a tensor missing": ({n: a for n, a in saved.items() if n != slot}, f"{slot} is missing"),
        "a model's tensor of another shape": (saved | {"model/dense/bias#2": np.zeros(3, "f4")}, "model/dense/bias#2"),
    }
    for name in ("SGD", "RMSprop", "Lion"):
        other = distributed(new_optimizer(name))
        apply_steps(*other)
        misfits[name] = dp.export_state(*other), "is missing"
    for what, (bad, named) in misfits.items():
        for built in (False, True):
            model, optimizer = distributed(new_optimizer("Adam"))
            if built:
                apply_steps(model, optimizer)
            before = dp.digest(model, optimizer)
            raises(lambda m=model, o=optimizer, b=bad: dp.import_state(m, o, b), named)
            assert dp.digest(model, optimizer) == before and optimizer.built == built, (what, built)
    for name in OPTIMIZERS:
        if name not in ("Adam", "AdamW", "Lamb", "ScheduleFreeAdamW"):  # which keep state of the same names
            model, optimizer = distributed(new_optimizer(name))
            before = dp.digest(model, optimizer)
            raises(lambda m=model, o=optimizer: dp.import_state(m, o, saved), "optimizer/")
            assert dp.digest(model, optimizer) == before, name


@case
def what_ranks_keep_for_themselves_goes_on_where_it_was():
    layers = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dropout(0.5, seed=3)]
    model = keras.Sequential([keras.Input((40,)), *layers])
    x = np.ones((6, 40), "float32") * np.arange(6)[:, None]

    def draw():
        masks = keras.ops.convert_to_numpy(model(x, training=True)) == 0
        return masks.tolist(), float(keras.random.normal(())), (np.random.normal(), random.gauss(0, 1))

    dp.seed_local(model, 5, WORLD.rank)
    first = draw()
    others = dp.gather(first)
    for rank, other in enumerate(others):
        assert other[2] == first[2] and (rank == WORLD.rank or other[0] != first[0] and other[1] != first[1])
    saved = dp.export_local(model)
    assert {"model/batch_normalization/moving_mean", "random/keras", "random/python"} < set(saved)
    ahead = [draw(), draw()]
    bad = saved | {"random/keras": np.zeros(7)}
    before = dp.export_local(model)
    raises(lambda: dp.import_local(model, bad), "does not fit")
    assert all(np.array_equal(a, before[n], equal_nan=a.dtype.kind == "f") for n, a in dp.export_local(model).items())
    dp.import_local(model, saved)
    assert [draw(), draw()] == ahead
    dp.seed_local(model, 5, WORLD.rank)
    again = draw()
    assert again == first, [a == b for a, b in zip(again, first, strict=True)]


@case
def the_rate_is_set_as_keras_does():
    model, optimizer = distributed(new_optimizer("Adam"))
    plain = new_optimizer("Adam")
    for rate in (0.1, 1 / 3, 1e-46, 1e300, np.float64(0.7), np.float32(0.7), np.array(0.3), 2, keras.ops.ones(()) / 7):
        optimizer.learning_rate = plain.learning_rate = rate
        found, expected = (keras.ops.convert_to_numpy(o.learning_rate) for o in (optimizer, plain))
        assert found.tobytes() == expected.tobytes() and found.dtype == expected.dtype, rate
        assert isinstance(optimizer.learning_rate, keras.Variable)
    optimizer.learning_rate = 0.5
    before = model.get_weights()
    apply_steps(model, optimizer)
    other, slower = distributed(new_optimizer("Adam"))
    other.set_weights(before)
    slower.learning_rate.assign(0.5)
    apply_steps(other, slower)
    assert dp.digest(model, optimizer) == dp.digest(other, slower)
    scaled = distributed(keras.optimizers.LossScaleOptimizer(new_optimizer("Adam")))[1]
    scaled.learning_rate = 0.25
    assert float(scaled.inner_optimizer.learning_rate) == 0.25
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    decays = distributed(keras.optimizers.SGD(schedule))[1]
    try:
        decays.learning_rate = 0.3
    except TypeError as error:
        assert "LearningRateSchedule" in str(error)
    else:
        raise AssertionError("a schedule was replaced by a number")
    decays = distributed(keras.optimizers.SGD(lambda: 0.1))[1]
    decays.learning_rate = schedule
    assert float(decays.learning_rate) == np.float32(0.1)


@case
def arrays_become_the_backends_tensors():
    x, y = dp.on_device(np.eye(2, dtype="float32"), np.arange(3))
    assert keras.ops.is_tensor(x) and keras.ops.convert_to_numpy(keras.ops.matmul(x, x)).tolist() == [[1, 0], [0, 1]]
    assert keras.ops.convert_to_numpy(y).tolist() == [0, 1, 2]


@case
def averages_are_weighted():
    r, n = WORLD.rank, WORLD.size
    found = dp.average({"a": float(r), "b": np.array([[1.0, r]])}, weight=r + 1)
    weights = np.arange(1, n + 1)
    assert np.isclose(found["a"], np.average(np.arange(n), weights=weights))
    assert np.allclose(found["b"], [[1.0, found["a"]]]) and isinstance(found["a"], float)
    assert dp.gather({"rank": r}) == [{"rank": i} for i in range(n)]


@case
def compressed_gradients_agree():
    check_against_one_process(lambda: new_optimizer("SGD"), tolerance=5e-2, compression="fp16")


@case
def mistakes_get_one_clear_line():
    model, adam = new_model(), new_optimizer("Adam")
    raises(lambda: dp.distribute("adam", model), "'adam'", "keras.optimizers.Optimizer")
    raises(lambda: dp.distribute(object(), model), "builtins.object")
    if not TENSORFLOW:
        raises(lambda: dp.distribute(torch.optim.SGD([torch.ones(1)], 0.1), model), "torch.optim.sgd.SGD")
    raises(lambda: dp.distribute(adam, None), "NoneType")
    raises(lambda: dp.distribute(adam, model, accumulation_steps=0), "accumulation_steps is 0")
    raises(lambda: dp.distribute(adam, model, compression="zip"), "'zip'")
    clipped = new_optimizer("Adam", clipnorm=0.5, gradient_accumulation_steps=2)
    raises(lambda: dp.distribute(clipped, model, clip_norm=1.0), "clipnorm", "one of them")
    raises(lambda: dp.distribute(clipped, model, accumulation_steps=3), "gradient_accumulation_steps=2")
    multi = new_optimizer("MultiOptimizer")
    raises(lambda: dp.distribute(multi, model, clip_norm=1.0), "MultiOptimizer")
    built = new_optimizer("Adam")
    built.build(model.trainable_variables)
    raises(lambda: dp.distribute(built, model, accumulation_steps=2), "built")
    inner = new_optimizer("Adam")
    outer = keras.optimizers.LossScaleOptimizer(inner)
    raises(lambda: dp.distribute(inner, model), "inside a LossScaleOptimizer")
    dp.distribute(outer, model)

    class Own(keras.optimizers.SGD):
        def apply_gradients(self, grads_and_vars):
            pass

    raises(lambda: dp.distribute(Own(), model), "Own", "apply_gradients")
    globals()["inner_optimizer"] = adam  # only a name
    dp.distribute(adam, model)
    raises(lambda: dp.distribute(adam, model), "distributed already")
    raises(lambda: keras.optimizers.LossScaleOptimizer(adam), "can't be wrapped")
    raises(lambda: adam.stateless_apply([], [], []), "stateless_apply")
    raises(lambda: adam.apply([None], model.trainable_variables), "1 gradients for 4 variables")
    if TENSORFLOW:
        import horovod.tensorflow.keras

        raises(
            lambda: dp.distribute(horovod.tensorflow.keras.DistributedOptimizer(Own()), model),
            "DistributedOptimizer",
        )


if __name__ == "__main__":
    run_cases(dp, WORLD, sys.argv[1:])

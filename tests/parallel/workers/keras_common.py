"""What the workers of the tensorflow and keras adapters share: data, its parts, training, comparing."""

import inspect
import os

import keras
import numpy as np

from tests.parallel.workers.cases import case as case
from tests.parallel.workers.cases import run_cases as run_cases
from toolkit.errors import UsageError
from toolkit.sharding import Sharding

SAMPLES = 7  # not a multiple of the ranks: unequal parts
BACKEND = keras.backend.backend()
# What start() is given: tests of one machine's workers on its GPUs let them share.
DEVICE = {"device": os.environ.get("HVDKIT_TEST_DEVICE", "cpu"), "share_gpus": True}
OPTIMIZERS = {
    name: kind
    for name, kind in inspect.getmembers(keras.optimizers, inspect.isclass)
    if issubclass(kind, keras.optimizers.Optimizer) and kind is not keras.optimizers.Optimizer
}


def batch(step, samples=SAMPLES):
    generator = np.random.default_rng(step)
    x = generator.normal(size=(samples, 4)).astype("float32")
    return x, (x.sum(1, keepdims=True) * 3 + 1).astype("float32")


def mine(world, accumulation_steps=1):
    """From a step to this rank's part of its batch: (x, y, weight of each sample)."""

    def part(step):
        step, number = divmod(step, accumulation_steps)
        x, y = batch(step)
        sharding = Sharding(SAMPLES, SAMPLES, world.size, accumulation_steps=accumulation_steps)
        p = sharding.part(np.arange(SAMPLES), world.rank, number)
        return x[p.indices], y[p.indices], np.full(len(p.indices), p.weight, "float32")

    return part


def whole(step):
    return (*batch(step), np.ones(SAMPLES, "float32"))


class Steps(keras.utils.PyDataset):
    def __init__(self, part, steps=4):
        super().__init__()
        self.part, self.steps = part, steps

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        return self.part(index)


def new_model(seed=0, kind=keras.Sequential):
    keras.utils.set_random_seed(seed)
    return kind([keras.Input((4,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)])


def new_optimizer(name, **options):
    kind, sgd = OPTIMIZERS[name], keras.optimizers.SGD(0.02, momentum=0.9)
    if name == "LossScaleOptimizer":
        return kind(sgd, initial_scale=8.0, dynamic_growth_steps=2)
    if name == "MultiOptimizer":
        return kind(keras.optimizers.OptimizerMap(sgd, {".*bias": keras.optimizers.Adam(0.01)}))
    return kind(learning_rate=0.02, **options)


def fit(model, optimizer, part, steps=4, epochs=1, compiled=None, **options):
    model.compile(optimizer, loss="mse", **(compiled or {}))
    return model.fit(Steps(part, steps), epochs=epochs, shuffle=False, verbose=0, **options)


def equal_on_all_ranks(dp, model, optimizer):
    digests = dp.gather(dp.digest(model, optimizer))
    return all(other == digests[0] for other in digests)


def assert_close(dp, found, reference, tolerance=2e-5):
    """`found` and `reference` are (model, optimizer); every variable is compared."""
    one, other = dp.export_state(*found), dp.export_state(*reference)
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], rtol=tolerance, atol=tolerance, err_msg=name)


def half_precision(policy, clip=0.05):
    """A model of new_model's seed 0 in mixed precision, and its optimizer, which scales the loss for float16."""
    keras.config.set_dtype_policy(policy)
    try:
        model = new_model()
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=clip)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
    return model, optimizer


def way(model, before):
    """How far the weights have come since `before`, as one vector."""
    return np.concatenate([(a - b).ravel() for a, b in zip(model.get_weights(), before, strict=True)])


def raises(function, *texts):
    try:
        function()
    except UsageError as error:
        assert "\n" not in str(error), error
        assert all(text in str(error) for text in texts), str(error)
        return
    raise AssertionError(f"no UsageError with {texts}")

"""What reducer_cases.py needs of the tensorflow adapter and of the keras adapter on both backends."""

import importlib
import os
import sys

import keras
import numpy as np

from toolkit import tuning
from toolkit.adapters import _job

dp = importlib.import_module(f"toolkit.adapters.{sys.argv[1]}")
TENSORFLOW = keras.backend.backend() == "tensorflow"
if TENSORFLOW:
    import tensorflow as tf


class Weights(keras.Layer):
    def __init__(self, shapes, dtypes, begin):
        super().__init__()
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            self.add_weight(shape=shape, dtype=dtype, initializer=keras.initializers.Constant(begin), name=f"w{i}")
        self.built = True


class Rows:
    """A gradient of ones in some rows of a table, by their numbers."""

    def __init__(self, rows, shape):
        self.rows, self.shape = rows, shape

    def slices(self):
        ones = tf.ones((len(self.rows), self.shape[1]))
        return tf.IndexedSlices(ones, tf.constant(self.rows), tf.constant(self.shape))


class Trial:
    """As in reducer_torch.py. On TensorFlow steps are graphs of `tf.function`, or with `eager` they are not."""

    def __init__(self, shapes, dtypes=None, options=None, begin=0.0, eager=False, **distribute):
        self.model = Weights(shapes, dtypes or ["float32"] * len(shapes), begin)
        optimizer = keras.optimizers.SGD(**{"learning_rate": 1.0, **(options or {})})
        self.optimizer = dp.distribute(optimizer, self.model, **distribute)
        self.graph = TENSORFLOW and not eager
        self.functions = {}

    def step(self, gradients):
        """One pass with this rank's gradients: arrays, or None."""
        variables = self.model.trainable_variables
        have = tuple(i for i, g in enumerate(gradients) if g is not None)
        if have not in self.functions:

            def apply(*tensors):
                given = dict(zip(have, tensors, strict=True))
                self.optimizer.apply([given.get(i) for i in range(len(variables))], variables)

            self.functions[have] = tf.function(apply) if self.graph else apply
        self.functions[have](*(self.tensor(gradients[i], variables[i].dtype) for i in have))

    def tensor(self, gradient, dtype):
        return gradient.slices() if isinstance(gradient, Rows) else keras.ops.convert_to_tensor(gradient, dtype)

    def values(self):
        return [
            np.array(keras.ops.convert_to_numpy(keras.ops.cast(v, "float64"))) for v in self.model.trainable_variables
        ]

    def name(self, i):
        return self.model.trainable_variables[i].path

    def averager(self):
        return self.optimizer._average


def own_cases(case, world, given, by_numpy, same_everywhere):
    """Make the cases that only TensorFlow has; see reducer_torch.py."""

    def several():
        """Two optimizers whose steps do not depend on each other, in one graph: one order on all ranks."""
        shapes = [[(300, 300), (3,)], [(17,)], [(40, 40)]]
        trials = [Trial(each, reducer="mpi") for each in shapes]

        @tf.function
        def step(*gradients):
            for trial, given in zip(trials, gradients, strict=True):
                trial.optimizer.apply(given, trial.model.trainable_variables)

        for number in range(8):
            step(*([tf.constant(g) for g in given(number, each)] for each in shapes))
        for trial, each in zip(trials, shapes, strict=True):
            means = [by_numpy(number, each) for number in range(8)]
            for value, expected in zip(trial.values(), zip(*means, strict=True), strict=True):
                np.testing.assert_allclose(value, -sum(expected), rtol=1e-4, atol=1e-4)
            assert same_everywhere(trial.values())

    def sparse_embeddings():
        """Rows of an embedding travel by themselves, the dense weights beside them by the reducer."""
        for eager in (False, True):
            found = {}
            for reducer in ("mpi", "auto"):
                _job._cycles.update(fast=tuning.CYCLE_TIME, slow=tuning.SLOW_CYCLE)  # as after start()
                trial = Trial([(9, 3), (4,)], eager=eager, reducer=reducer)
                for _ in range(2):
                    trial.step([Rows([world.rank, world.rank, 8], (9, 3)), np.full(4, 1.0 + world.rank)])
                table, dense = found[reducer] = trial.values()
                expected = np.zeros((9, 3))
                expected[: world.size], expected[8] = -4 / world.size, -2
                np.testing.assert_allclose(table, expected, rtol=1e-6)
                np.testing.assert_allclose(dense, -(1 + world.size), rtol=1e-6)
                taken = "mpi" if reducer == "mpi" and "HVDKIT_TEST_CHOOSES" not in os.environ else "horovod"
                assert trial.averager().reducer == taken
                assert os.environ["HOROVOD_CYCLE_TIME"] == tuning.CYCLE_TIME, "each step waits for Horovod"
            assert all(np.array_equal(a, b) for a, b in zip(*found.values(), strict=True))

    if TENSORFLOW:
        case(several, "independent_optimizers_in_one_graph")
        case(sparse_embeddings, "sparse_embeddings_beside_dense_weights")

"""Keras' own `fit` on arrays, no communication: each process trains by itself; KERAS_BACKEND says on what."""

import contextlib

import keras_common as common

from tests.benchmarks import models
from tests.benchmarks.turns import Over, place

common.set_threads()
rank, _ = place()
model = common.build()
model.compile(optimizer=common.optimizer(), loss=common.loss())
x, y = common.arrays([rank])
with contextlib.suppress(Over):
    model.fit(
        x,
        y,
        batch_size=models.BATCH,
        epochs=10**6,
        shuffle=False,
        verbose=0,
        callbacks=[common.Steps(common.begin(rank, model))],
    )

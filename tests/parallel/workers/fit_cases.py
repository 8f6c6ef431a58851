"""What `fit` does at its end, under a run: averaged weights (EMA), and an early stop; on two ranks."""

import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np

import toolkit.adapters.keras as dp
from toolkit import checkpoint
from toolkit.datasets import Split
from toolkit.options import RunOptions
from toolkit.run import Run

base = Path(sys.argv[1])
world = dp.start()
generator = np.random.default_rng(0)
data = Split(generator.normal(size=(40, 4)).astype("float32"), generator.normal(size=(40, 1)).astype("float32"))


def train(options, callbacks=()):
    """Number of calls of fit, and the newest checkpoint."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
    optimizer = dp.distribute(optimizer, model)
    model.compile(optimizer=optimizer, loss="mse")
    calls = 0
    with Run(options, world, dp, model, optimizer, len(data)) as run:
        while not run.finished:
            calls += 1
            model.fit(
                dp.Batches(run, data),
                initial_epoch=run.epoch,
                epochs=run.whole_epochs_until,
                shuffle=False,
                verbose=0,
                callbacks=[dp.MetricAverage(), dp.RunCallback(run, {}), *callbacks],
            )
    dp.gather(None)  # rank 0 has written
    return calls, checkpoint.newest(options.output), model.get_weights()


options = RunOptions(epochs=3, global_batch_size=8)
_, straight, averaged = train(replace(options, output=base / "straight"))
kernel = straight.state["model/dense/kernel"]
assert not np.array_equal(averaged[0], kernel), "fit leaves the averaged weights, the checkpoint holds the others"
train(replace(options, output=base / "resumed", max_steps=7))
calls, resumed, again = train(replace(options, output=base / "resumed", resume=True))
assert calls == 2 and resumed.path.name == straight.path.name
for name, array in straight.state.items():
    assert resumed.state[name].tobytes() == array.tobytes(), name
assert all(np.array_equal(a, b) for a, b in zip(averaged, again, strict=True))

stopping = keras.callbacks.EarlyStopping("loss", patience=1, min_delta=1000.0)
calls, stopped, _ = train(replace(options, output=base / "stopped", epochs=6, checkpoint_every=6), [stopping])
assert calls == 1 and stopped.manifest["position"]["epoch"] == 2, stopped and stopped.manifest["position"]
if world.rank == 0:
    print("fit ends well")
dp.stop()

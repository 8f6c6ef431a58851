"""Where TensorFlow's operations are put, by NCCL and through the host: a second CPU plays the GPU."""

import json

import numpy as np
import tensorflow as tf

import toolkit.adapters.tensorflow as dp
from toolkit.adapters import _job, _tensorflow_horovod, _tensorflow_ops

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
world = dp.start()


def places(variables):
    return sorted({variable.device[-5:] for variable in variables})


def found(way):
    """What a step that hears rank 1's flag has where."""
    _job.reduces_on_gpu = lambda: way == "nccl"
    with tf.device("CPU:1"):
        model = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(2)])
        optimizer = dp.distribute(tf.keras.optimizers.SGD(1.0), model, reducer="horovod")
        dp.broadcast_state(model)
        before = model.get_weights()[0]

        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        dp.exchange_flag(world.rank == 1)
        step(tf.fill((1, 3), float(world.rank)))
    heard, _ = dp.exchange_flag(False)
    graph = step.get_concrete_function(tf.TensorSpec((1, 3))).graph
    exchange = _tensorflow_horovod.in_graph()
    return {
        "weights": places(v.value for v in model.variables),
        "reduces": sorted({o.device[-5:] for o in graph.get_operations() if "Horovod" in o.type}),
        "beside": places([exchange.flag, exchange.heard, exchange.broken, exchange.guarded]),
        "heard": heard,
        "right": bool(np.allclose(before - model.get_weights()[0], (world.size - 1) / 2)),
    }


def arrays():
    """Where arrays are, given to a worker with the CPU, and with the GPU that CPU:1 plays."""
    found = []
    for has_gpu in (False, True):
        _job.has_gpu = lambda has_gpu=has_gpu: has_gpu
        x, y = dp.on_device(np.ones((2, 3)), np.arange(2.0))
        assert x.shape == (2, 3) and x.dtype == tf.float64 and y.numpy().tolist() == [0, 1]
        found.append(places([x, y]))
    return found


_tensorflow_ops._GPU = "CPU:1"
told = json.dumps(arrays())
if world.rank == 0:
    print("arrays", told, flush=True)
for way in ("nccl", "host"):
    told = json.dumps(found(way))
    if world.rank == 0:
        print(way, told, flush=True)
dp.stop()

"""tf.distribute.MultiWorkerMirroredStrategy with its custom loop and ring collectives, which serve CPUs.

Keras' `fit` is the other way that is documented; the loop has less to do a step.
"""

import os

import tensorflow as tf
import tensorflow_common as common
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.python.eager import context

from tests.benchmarks.turns import place

rank, size = place()
common.set_threads()
if size > 1:
    # Its heart beats no more while it is stopped between turns, and after ten seconds the others would give it up.
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        heartbeat_timeout_in_ms=3_600_000,
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=size)],
    )
options = tf.distribute.experimental.CommunicationOptions(
    implementation=tf.distribute.experimental.CommunicationImplementation.RING
)
strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)  # TF_CONFIG is set
with strategy.scope():
    model, optimizer = common.build(), common.optimizer()
    loss_of = common.loss()


@tf.function
def train_step(x, y):
    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))  # Keras 3 divides it by the number of replicas
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return strategy.run(replica_step, args=(x, y))


turns = common.begin(rank, model)
for x, y in turns.of(common.batches(rank)):
    train_step(x, y)
os._exit(0)  # without a barrier at its end, whose wait is no part of the benchmark

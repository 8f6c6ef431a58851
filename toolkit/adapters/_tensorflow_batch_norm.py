"""Mean and variance over the samples of all ranks, for BatchNormalization in the tensorflow adapter and Keras on it.

What the ranks tell each other, and in which precision, is as in `_torch_batch_norm`.
"""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from toolkit.adapters import _job
from toolkit.adapters._tensorflow_horovod import waiting, where_reduced
from toolkit.errors import UsageError


def keep_quick() -> None:
    """Have Horovod answer quickly, which each layer waits for."""
    _job.keep_quick(hvd)


@tf.autograph.experimental.do_not_convert
def moments(x: Any, mask: Any, axis: int, name: str, epsilon: float) -> tuple[Any, Any]:
    """As `_torch_batch_norm.moments`, of TensorFlow's tensors.

    Raises:
        UsageError: XLA is to compile it.
    """
    if not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        error = UsageError(
            "jit_compile=True compiles the model with XLA, which can't hold the other ranks' BatchNorm statistics: "
            "use jit_compile=False."
        )
        vars(error)["_keras_call_info_injected"] = True  # or Keras would put it among lines of its own
        raise error

    @tf.custom_gradient
    def over_all_ranks(x: Any) -> Any:
        count, mean, variance = _over_all_ranks(x, mask, axis, f"{name}.forward", epsilon)
        mean, variance = tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)

        def gradient(d_mean: Any, d_variance: Any) -> Any:
            own = tf.cast(tf.stack([d_mean, d_variance]), tf.float64)
            of_mean, of_variance = tf.unstack(tf.cast(_all_reduce_sum(own, f"{name}.backward") / count, x.dtype))
            d_x = _along(axis, of_mean, x) + 2 * (x - _along(axis, mean, x)) * _along(axis, of_variance, x)
            return d_x if mask is None else tf.where(mask, d_x, tf.zeros_like(d_x))

        return (mean, variance), gradient

    return over_all_ranks(x)


def _over_all_ranks(x: Any, mask: Any, axis: int, name: str, epsilon: float) -> tuple[Any, Any, Any]:
    """Epsilon and the number of values of each channel, their mean and their variance: float64, shape (channels,)."""
    others = [i for i in range(len(x.shape)) if i != axis % len(x.shape)]
    channels = x.shape[axis]
    if mask is None:
        count = tf.fill([channels], tf.cast(tf.size(x) // channels, tf.float64))
        values = x
    else:
        count = tf.cast(tf.math.count_nonzero(mask, others), tf.float64)
        values = tf.where(mask, x, tf.zeros_like(x))
    at_least_one = tf.maximum(count, 1.0)  # where a rank has none, what there is of them adds up to 0
    mean = tf.cast(tf.reduce_sum(values, others), tf.float64) / at_least_one
    distances = values - _along(axis, tf.cast(mean, x.dtype), x)
    distances = distances if mask is None else tf.where(mask, distances, tf.zeros_like(x))
    variance = tf.cast(tf.reduce_sum(tf.square(distances), others), tf.float64) / at_least_one
    own = tf.stack([count, count * mean, count * (variance + tf.square(mean))])
    count, total, squares = tf.unstack(_all_reduce_sum(own, name))
    mean = total / (count + epsilon)
    variance = (squares - 2 * mean * total + count * tf.square(mean)) / (count + epsilon)
    return count + epsilon, mean, tf.maximum(variance, 0.0)


def _all_reduce_sum(tensor: Any, name: str) -> Any:
    # The scope's "/" makes it the same wherever a layer lies, and the graph numbers the names in it: so the operations
    # of a layer that is called twice are told apart, alike on all ranks.
    with waiting(name), tf.name_scope("hvdkit/"):
        return hvd.allreduce(
            tensor, op=hvd.Sum, name=name, device_dense=where_reduced(), process_set=_job.process_set()
        )


def _along(axis: int, channels: Any, x: Any) -> Any:
    """A number of each channel, in a shape that goes with the samples'."""
    shape = [1] * len(x.shape)
    shape[axis] = -1
    return tf.reshape(channels, shape)

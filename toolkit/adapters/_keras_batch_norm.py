"""Keras' BatchNormalization over the samples of all ranks, on any backend."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import keras

from toolkit.adapters import _job
from toolkit.adapters._keras_classes import change_class, mixed_in
from toolkit.errors import UsageError


def synchronize(model: Any, layers: Iterable[Any], backend: Any) -> None:
    """Change the class of BatchNormalization layers, in place; variables and configuration stay as they are.

    Args:
        model: what they belong to.
        layers: all of its layers, those within layers too.
        backend: the module with `moments`, `keep_quick` and `hvd`.

    Raises:
        UsageError: there is none, or one that can't be synchronised; no layer was changed.
    """
    found = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    if not found:
        raise UsageError(
            f"this {type(model).__name__} has no BatchNormalization layer: leave synchronize_batch_norm() out, or call "
            "it once the model has its layers."
        )
    plain = keras.layers.BatchNormalization
    for layer in found:
        kind: Any = type(layer)
        if not isinstance(layer, _Synchronized) and (kind.call, kind._moments) != (plain.call, plain._moments):
            raise UsageError(
                f"{layer.path} is a {kind.__module__}.{kind.__name__}, which normalises by a call() of its own: use "
                "keras.layers.BatchNormalization, which synchronize_batch_norm() knows."
            )
    for layer in found:
        if not isinstance(layer, _Synchronized):
            kind = type(layer)
            change_class(layer, _synchronized(kind, backend))
            layer._collective = _job.batch_norm_name()
    backend.keep_quick()
    if isinstance(model, keras.Model):
        model.train_function = None  # one that is traced already would go on without


@functools.cache
def _synchronized(kind: type, backend: Any) -> type:
    """A class like a BatchNormalization layer's, over all ranks' samples."""
    return mixed_in(_Synchronized, kind, _backend=backend)


class _Synchronized(keras.layers.BatchNormalization):
    """Mixed in before a layer's own class by `synchronize`; has no constructor of its own."""

    _backend: Any
    _collective = "batch_norm"  # names its operations; by this name those of a clone

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        if not _job.is_parallel(self._backend.hvd):
            return super()._moments(inputs, mask)
        if mask is None:
            return self._backend.moments(inputs, None, self.axis, self._collective, 0.0)
        mask = keras.ops.cast(keras.ops.expand_dims(mask, -1), "bool")
        mask = keras.ops.broadcast_to(mask, keras.ops.shape(inputs))
        return self._backend.moments(inputs, mask, self.axis, self._collective, keras.backend.epsilon())

"""A Keras model's file, `.keras` or `.weights.h5`, on any backend."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from toolkit.adapters import _keras_state
from toolkit.errors import UsageError


def write(state: Mapping[str, np.ndarray], manifest: Mapping[str, Any], file: Path) -> int:
    """Build the model again, give it its weights, and have Keras write it, not compiled.

    Args:
        state: `model/<name>` to arrays.
        manifest: the checkpoint's; its `architecture` is the model's configuration.
        file: is written, or left in part where that fails; its suffix chooses Keras' format.

    Returns:
        The number of arrays.

    Raises:
        UsageError: the model can't be built from its configuration, as with layers of one's own.
        OSError: the disk is full, read-only or gone.
    """
    model = _build(manifest["architecture"])
    try:
        _keras_state.import_state(model, None, state)
    except UsageError as error:
        raise UsageError(
            f"the model that Keras builds again from the checkpoint's architecture is another one: {error}"
        ) from None
    if file.name.endswith(".weights.h5"):
        _save_weights(model, file)
    else:
        model.save(file)
    return len(state)


def _save_weights(model: Any, file: Path) -> None:
    """As `save_weights`, on whose way HDF5 crashes the process where the disk is full."""
    whole = file.with_name(f"{file.name}.keras")
    try:
        model.save(whole)
        with zipfile.ZipFile(whole) as archive, archive.open("model.weights.h5") as weights, file.open("wb") as opened:
            shutil.copyfileobj(weights, opened)
    finally:
        whole.unlink(missing_ok=True)


def _build(architecture: str) -> Any:
    # Without how it was compiled: its loss may be the user's own, its optimizer is one backend's, and
    # the optimizer's state is not part of the file.
    config = json.loads(architecture, object_hook=lambda d: {k: v for k, v in d.items() if k != "compile_config"})
    try:
        return keras.models.model_from_json(json.dumps(config))
    except Exception as error:  # whatever a layer's configuration makes it raise
        cause = str(error).split("Exception encountered: ")[-1] or type(error).__name__  # behind the layers around it
        reason = cause.splitlines()[0].split(". ")[0].rstrip(".")
        raise UsageError(
            f"Keras can't build this model again from the checkpoint's architecture ({reason}), as with layers "
            "of one's own. Build the model in a script, and there: adapter.import_state(model, None, "
            "toolkit.checkpoint.read(path).state); model.save(file)."
        ) from None

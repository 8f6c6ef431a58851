"""A torch model's file: a state dict that `torch.load(path, weights_only=True)` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


def write(state: Mapping[str, np.ndarray], manifest: Mapping[str, Any], file: Path) -> int:
    """Write {name: tensor} as `model.load_state_dict` takes it, in the dtypes that the model had.

    Args:
        state: `model/<name>` to arrays.
        manifest: the checkpoint's; its `bfloat16` names tensors that were widened to be saved.
        file: is written, or left in part where that fails.

    Returns:
        The number of tensors.

    Raises:
        OSError: the disk is full, read-only or gone.
    """
    narrow = set(manifest.get("bfloat16", ()))
    tensors = {}
    for name, array in state.items():
        name = name.removeprefix("model/")
        tensor = torch.from_numpy(np.require(array, requirements="W"))
        tensors[name] = tensor.to(torch.bfloat16) if name in narrow else tensor
    with file.open("wb") as opened:  # torch's own opening hides the system's error
        torch.save(tensors, opened)
    return len(tensors)

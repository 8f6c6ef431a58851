"""Named state of Keras models, `tf.Module`s and Keras optimizers, on any backend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from toolkit.adapters import _shared
from toolkit.errors import UsageError


def export_state(model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
    """`Adapter.export_state`, random states of the model's layers included."""
    return {name: _to_numpy(variable) for name, variable in _named(model, optimizer).items()}


def digest(model: Any, optimizer: Any = None) -> dict[str, str]:
    """`Adapter.digest`."""
    own = random_names(model)
    statistics = re.compile(r"/moving_(mean|variance)(#\d+)?$")  # of BatchNormalization
    state = export_state(model, optimizer)
    return _shared.digest_arrays({n: a for n, a in state.items() if n not in own and not statistics.search(n)})


def import_state(model: Any, optimizer: Any, state: Mapping[str, np.ndarray]) -> None:
    """`Adapter.import_state`."""
    check_built(model)
    _shared.check_state_fits({n: a for n, a in state.items() if n.startswith("model/")}, export_state(model))
    if optimizer is not None and not optimizer.built and len(state) > len(_named(model, optimizer)):
        optimizer.build(model.trainable_variables)
    named = _named(model, optimizer)
    if optimizer is not None:
        _shared.check_state_fits(state, export_state(model, optimizer))
    for name, variable in named.items():
        array = state[name]
        variable.assign(array if isinstance(variable, keras.Variable) else array.astype(variable.dtype.as_numpy_dtype))


def broadcast_state(model: Any, optimizer: Any, hvd: Any) -> None:
    """`Adapter.broadcast_state`; random states stay each rank's own."""
    check_built(model)
    state = hvd.broadcast_object(export_state(model, optimizer), root_rank=0, name="hvdkit.state")
    if hvd.rank() != 0:
        own = export_state(model)
        import_state(model, optimizer, {**state, **{name: own[name] for name in random_names(model)}})


def check_built(model: Any) -> None:
    """Raise `UsageError` for a model whose variables do not exist yet."""
    if not getattr(model, "built", True) or not model.variables:
        raise UsageError(
            "the model has no variables yet: give it an input shape (keras.Input as first layer), "
            "or call it once on a batch."
        )


def random_names(model: Any) -> set[str]:
    """The names of random states (of dropout, say), which are variables of the model but no weights."""
    weights = {id(v) for v in getattr(model, "weights", model.variables)}
    return {name for name, variable in _named(model, None).items() if id(variable) not in weights}


def _named(model: Any, optimizer: Any) -> dict[str, Any]:
    """Names to variables; two of one name are told apart by their order: `…/kernel`, `…/kernel#2`."""
    names = [f"model/{_model_name(v)}" for v in model.variables]
    variables = list(model.variables)
    if optimizer is not None:
        # Keras names a slot `<variable's path with _ for />_<slot>`.
        owners = {re.sub("[/:]", "_", getattr(v, "path", v.name)): _model_name(v) for v in model.trainable_variables}
        names += [f"optimizer/{_slot_name(v.name, owners)}" for v in optimizer.variables]
        variables += optimizer.variables
    return dict(zip(_unique(names), variables, strict=True))


def _model_name(variable: Any) -> str:
    """`<layer>/<variable>`: what comes before it in the path depends on how the model was put together or loaded."""
    path = getattr(variable, "path", variable.name.split(":")[0])
    return "/".join(_without_counter(part) for part in path.split("/")[-2:])


def _slot_name(name: str, owners: Mapping[str, str]) -> str:
    for owner in sorted((o for o in owners if name.startswith(f"{o}_")), key=len, reverse=True):
        return f"{owners[owner]}/{_without_counter(name[len(owner) + 1 :])}"
    return _without_counter(name)


def _without_counter(name: str) -> str:
    """Keras numbers what it names itself by the process's history: dense_7."""
    return re.sub(r"_\d+$", "", name)


def _unique(names: Iterable[str]) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def _to_numpy(variable: Any) -> np.ndarray:
    array = np.array(keras.ops.convert_to_numpy(variable) if isinstance(variable, keras.Variable) else variable.numpy())
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array

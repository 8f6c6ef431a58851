"""Named state of Keras models, `tf.Module`s and Keras optimizers, on any backend."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator
from keras.src.utils import module_utils
from keras.src.utils.rng_utils import GLOBAL_RANDOM_SEED

from toolkit import tuning
from toolkit.adapters import _keras_optimizer, _shared
from toolkit.errors import UsageError

_STATISTICS = re.compile(r"^model/.*/moving_(mean|variance)(#\d+)?$")  # of BatchNormalization


def export_state(model: Any, optimizer: Any = None) -> dict[str, np.ndarray]:
    """`Adapter.export_state`."""
    return {name: _to_numpy(variable) for name, variable in _named(model, optimizer).items()}


def digest(model: Any, optimizer: Any = None) -> dict[str, str]:
    """`Adapter.digest`."""
    state = export_state(model, optimizer)
    return _shared.digest_arrays({n: a for n, a in state.items() if not _STATISTICS.search(n)})


def seed(number: int) -> None:
    """What `keras.utils.set_random_seed` does for Keras itself; that function imports TensorFlow beside torch too."""
    global_state.set_global_attribute(GLOBAL_RANDOM_SEED, number)
    global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)  # made anew when it is wanted


def seed_random_layers(model: Any, seed: int, rank: int) -> None:
    """Give every random layer, and Keras' own generator, a state of this rank's."""
    for i, variable in enumerate(_random(model).values()):
        variable.assign([_shared.framework_seed(seed, rank) ^ i, 0])


def export_local(model: Any) -> dict[str, np.ndarray]:
    """`Adapter.export_local` but for the backend's generators."""
    statistics = {name: v for name, v in _named(model, None).items() if _STATISTICS.search(name)}
    keras_own = {name: _to_numpy(variable) for name, variable in {**_random(model), **statistics}.items()}
    return {**_shared.export_python_and_numpy(), **keras_own}


def import_local(model: Any, state: Mapping[str, np.ndarray]) -> None:
    """Put back what `export_local` gave; the caller has checked that it fits."""
    _shared.import_python_and_numpy(state)
    for name, variable in {**_random(model), **_named(model, None)}.items():
        if name in state:
            variable.assign(state[name])


def describe(model: Any) -> dict[str, Any]:
    """`Adapter.describe` but for the framework's name."""
    backend = keras.backend.backend()
    versions = {name: sys.modules[name].__version__ for name in ("keras", backend, "numpy")}
    try:
        with _without_tensorflow():
            architecture = model.to_json()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        architecture = None  # a model of one's own class, which has no configuration
    return {"versions": versions, "backend": backend, "architecture": architecture}


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Keep Keras from importing TensorFlow, 400 MB, only to ask whether an object it serializes is one of its types."""
    asks = "tensorflow" not in sys.modules and keras.backend.backend() != "tensorflow"
    before = module_utils.tensorflow._available
    if asks:
        module_utils.tensorflow._available = False
    try:
        yield
    finally:
        module_utils.tensorflow._available = before


def import_state(model: Any, optimizer: Any, state: Mapping[str, np.ndarray]) -> None:
    """`Adapter.import_state`."""
    check_built(model)
    _shared.check_state_fits({n: a for n, a in state.items() if n.startswith("model/")}, export_state(model))
    if optimizer is not None:
        # One that has stepped was built, even where it keeps nothing per parameter, as plain SGD.
        stepped = any(n.startswith("optimizer/iteration") and np.any(a) for n, a in state.items())
        builds = not optimizer.built and (stepped or len(state) > len(_named(model, optimizer)))
        _shared.check_state_fits(state, export_state(model, _built_twin(optimizer, model) if builds else optimizer))
        if builds:
            optimizer.build(model.trainable_variables)
    named = _named(model, optimizer)
    for name, variable in named.items():
        array = state[name]
        variable.assign(array if isinstance(variable, keras.Variable) else array.astype(variable.dtype.as_numpy_dtype))


def broadcast_state(model: Any, optimizer: Any, broadcast: Any, root: bool) -> None:
    """`Adapter.broadcast_state`.

    Args:
        model: the model.
        optimizer: its optimizer, or None.
        broadcast: the backend's function that gives every rank the root's array of bytes.
        root: whether this rank is the one that the state comes from.
    """
    check_built(model)
    state = export_state(model, optimizer) if root else {}
    form = json.dumps([(name, array.dtype.str, array.shape) for name, array in state.items()]).encode()
    length = broadcast(np.array([len(form)], np.int64).view(np.uint8))
    told = broadcast(np.frombuffer(form, np.uint8) if root else np.zeros(length.view(np.int64)[0], np.uint8))
    for name, dtype, shape in json.loads(told.tobytes()):
        held = state[name] if root else np.zeros(shape, dtype)
        received = broadcast(np.ascontiguousarray(held).reshape(-1).view(np.uint8))
        state[name] = received.view(dtype).reshape(shape)
    if not root:
        import_state(model, optimizer, state)
    del state
    tuning.return_unused_memory()


def check_built(model: Any) -> None:
    """Raise `UsageError` for a model whose variables do not exist yet."""
    if not getattr(model, "built", True) or not model.variables:
        raise UsageError(
            "the model has no variables yet: give it an input shape (keras.Input as first layer), "
            "or call it once on a batch."
        )


def _built_twin(optimizer: Any, model: Any) -> Any:
    """What the optimizer will be once it is built, which Keras can't undo where the saved state does not fit."""
    try:
        twin = _keras_optimizer.plain_class(optimizer).from_config(optimizer.get_config())
    except Exception:  # one of the user's own may have no configuration
        twin = optimizer
    twin.build(model.trainable_variables)
    return twin


def _random(model: Any) -> dict[str, Any]:
    """Names to random states: of the model's layers (such as dropout), and of Keras' own generator."""
    weights = {id(v) for v in _weights(model)}
    layers = [v for v in model.variables if id(v) not in weights]
    names = _unique(f"random/{_model_name(v)}" for v in layers)
    return {**dict(zip(names, layers, strict=True)), "random/keras": global_seed_generator().state}


def _weights(model: Any) -> list[Any]:
    """The model's variables without the random states of its layers, which Keras counts among them."""
    return list(getattr(model, "weights", model.variables))


def _named(model: Any, optimizer: Any) -> dict[str, Any]:
    """Names to variables; two of one name are told apart by their order: `…/kernel`, `…/kernel#2`."""
    variables = _weights(model)
    names = [f"model/{_model_name(v)}" for v in variables]
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

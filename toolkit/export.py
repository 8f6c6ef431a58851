"""A checkpoint's model as a file of its framework's own; needs neither Horovod nor MPI."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from toolkit import checkpoint
from toolkit.errors import UsageError

# What a run's framework can write, and the module that does.
_KERAS = (".keras", ".weights.h5"), "_keras_file"
_FORMATS = {"torch": ((".pt",), "_torch_file"), "tensorflow": _KERAS, "keras": _KERAS}


def check_file(file: Path) -> None:
    """Raise `UsageError` where a new file of this name can't be made or is of no known format."""
    if os.path.lexists(file):
        raise UsageError(f"--output {file} exists already: give another name, or remove it first.")
    suffixes = list(dict.fromkeys(suffix for accepted, _ in _FORMATS.values() for suffix in accepted))
    if not _suffix(file, suffixes):
        raise UsageError(f"--output {file} is of no known format: give a name that ends in {' or '.join(suffixes)}.")
    if not file.parent.is_dir():
        raise UsageError(f"--output {file}: there is no directory {file.parent}; make it first.")


def export(found: checkpoint.Checkpoint, file: Path) -> int:
    """Write a checkpoint's model, without its optimizer, to a new file of its framework's own format.

    `.pt`: a torch state dict. `.keras`: a Keras model, not compiled. `.weights.h5`: its weights alone.
    BatchNorm's running statistics are the checkpoint's: the mean over its ranks.

    Args:
        found: the checkpoint.
        file: its suffix chooses the format; made under a temporary name beside it.

    Returns:
        The number of tensors in it.

    Raises:
        UsageError: the file exists or its directory does not, its format is none of the run's
            framework, the framework is not installed, or the model can't be built again.
    """
    check_file(file)
    framework = found.manifest.get("framework")
    if framework not in _FORMATS:
        raise UsageError(f"{found.path} names no framework that it comes from: give a checkpoint that a run has saved.")
    accepted, module = _FORMATS[framework]
    suffix = _suffix(file, accepted)
    if not suffix:
        raise UsageError(
            f"--output {file} does not fit a {framework} run: give a name that ends in {' or '.join(accepted)}."
        )
    state = {name: found.state[name] for name in sorted(found.state) if name.startswith("model/")}
    if not state:
        raise UsageError(f"{found.path} holds no model: give a checkpoint that a run has saved.")
    if framework != "torch":
        _prepare_keras(found)
    writer = _import(module, framework)
    temporary = file.parent / f".{file.name}.{os.getpid()}.tmp{suffix}"
    try:
        count = writer.write(state, found.manifest, temporary)
        checkpoint.flush(temporary)
        _give_name(temporary, file)
    except OSError as error:
        raise UsageError(f"--output {file} can't be written: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _suffix(file: Path, suffixes: tuple[str, ...] | list[str]) -> str | None:
    return next((suffix for suffix in suffixes if file.name.endswith(suffix) and file.name != suffix), None)


def _prepare_keras(found: checkpoint.Checkpoint) -> None:
    """Choose the run's backend where the user has chosen none, or say that the model has no configuration."""
    if not found.manifest.get("architecture"):
        raise UsageError(
            f"{found.path} is of a model of one's own class, whose architecture is not in the checkpoint. Build "
            "the model in a script, and there: adapter.import_state(model, None, "
            "toolkit.checkpoint.read(path).state); model.save_weights(file)."
        )
    os.environ.setdefault("KERAS_BACKEND", str(found.manifest.get("backend", "tensorflow")))


def _import(module: str, framework: str) -> ModuleType:
    try:
        return importlib.import_module(f"toolkit.adapters.{module}")
    except (ImportError, ValueError) as error:  # ValueError: a KERAS_BACKEND that Keras does not know
        missing = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
        backend = f", KERAS_BACKEND={os.environ.get('KERAS_BACKEND')}" if module == "_keras_file" else ""
        raise UsageError(
            f"the model of a {framework} run can't be exported here{backend}: {missing.splitlines()[0]}. "
            "Install it, or export where the run was made."
        ) from None


def _give_name(temporary: Path, file: Path) -> None:
    """Rename without replacing a file that has come meanwhile, where the file system can."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        raise UsageError(f"--output {file} exists already: give another name, or remove it first.") from None
    except OSError:  # no hard links there
        temporary.rename(file)

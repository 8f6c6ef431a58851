"""The commands `hvdkit checkpoint list|show|verify|export`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import checkpoint, export
from toolkit.errors import UsageError

_EXAMPLE = "runs/cnn_torch-001"
# What of a manifest is shown otherwise than as an option of the run, or not at all.
_NO_OPTIONS = {
    "format_version", "framework", "versions", "backend", "architecture", "bfloat16", "recipe", "samples",
    "global_batch_size", "world_size", "position", "reference_batch_size", "extra", "extra_objects", "step", "sha256",
}  # fmt: skip


def add_to(commands: Any) -> None:
    """Add the command to what `argparse.ArgumentParser.add_subparsers` gave."""
    command = commands.add_parser("checkpoint", help="list, show, verify and export checkpoints")
    actions = command.add_subparsers(required=True, metavar="list|show|verify|export")
    for name, function, text in (
        ("list", _list, "the checkpoints of a run, a line each"),
        ("show", _show, "where a checkpoint comes from, and the names, types and shapes of its tensors"),
        ("verify", _verify, "check files against their hashes; exit code 1 where one is damaged"),
        ("export", _export, "write the model in its framework's own format"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        of_run = {"list": "", "verify": "; a run: all of its checkpoints"}.get(name, "; a run: its newest whole one")
        action.add_argument("path", type=Path, metavar="CHECKPOINT|RUN", help=f"directory of one{of_run}")
        if name == "export":
            action.add_argument(
                "--output", required=True, type=Path, metavar="FILE", help="new file: .pt, .keras or .weights.h5"
            )
        action.set_defaults(function=_saying_errors(function))


def _saying_errors(function: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Make damage one line and exit code 1, and what the system refuses one line and exit code 2."""

    def run(options: argparse.Namespace) -> int:
        try:
            return function(options)
        except checkpoint.DamagedCheckpoint as damage:
            print(f"error: {damage}", file=sys.stderr)
            return 1
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UsageError(f"{error.filename or options.path}: {error.strerror or error}.") from None

    return run


def _paths(path: Path) -> list[Path]:
    """A checkpoint itself, or a run's, oldest first."""
    if not path.is_dir():
        raise UsageError(f"{path} is no directory: give a run's, such as {_EXAMPLE}, or a checkpoint's within it.")
    found = [path] if checkpoint.is_checkpoint(path) else checkpoint.steps(path)
    if not found and any(path.glob("fold-*")):
        raise UsageError(f"{path} is of a cross-validation: give one of its folds, such as {path}/fold-1.")
    if not found:
        raise UsageError(f"{path} holds no checkpoint: give a run's directory, such as {_EXAMPLE}.")
    return found


def _newest_whole(path: Path) -> checkpoint.Checkpoint:
    found, damages = checkpoint.newest_whole(_paths(path))
    if found is None:
        raise damages[0]
    for damage in damages:
        print(f"warning: damaged checkpoint passed over: {damage}", file=sys.stderr)
    return found


def _list(options: argparse.Namespace) -> int:
    code = 0
    for path in _paths(options.path):
        written = f"{_megabytes(path):8.2f} MB  {_written(path)}"
        try:
            manifest = checkpoint.read(path).manifest
            epoch = manifest.get("position", {}).get("epoch", "-")
            print(
                f"{path}  step {manifest['step']:<8} epoch {epoch:<5} "
                f"{_printable(manifest.get('framework', '-')):<10}  "
                f"{manifest.get('world_size', '-'):>3} worker(s)  {written}  whole"
            )
        except checkpoint.DamagedCheckpoint as damage:
            code = 1
            print(f"{path}  {written}  {_damaged(path, damage)}")
    return code


def _verify(options: argparse.Namespace) -> int:
    code = 0
    for path in _paths(options.path):
        try:
            print(f"{checkpoint.read(path).path}  whole", flush=True)
        except checkpoint.DamagedCheckpoint as damage:
            code = 1
            print(f"{path}  {_damaged(path, damage)}", flush=True)
    return code


def _export(options: argparse.Namespace) -> int:
    export.check_file(options.output)  # before a large checkpoint is read
    found = _newest_whole(options.path)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Keras loads TensorFlow on any backend, and it talks
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # of this too; nothing is computed here
    count = export.export(found, options.output)
    print(f"{options.output}: {count} tensors of {found.path}")
    return 0


def _damaged(path: Path, damage: checkpoint.DamagedCheckpoint) -> str:
    return "DAMAGED: " + str(damage).replace(f"{path}/", "").removeprefix(f"{path} ")


def _megabytes(path: Path) -> float:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file()) / 1e6


def _written(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))


def _show(options: argparse.Namespace) -> int:
    found = _newest_whole(options.path)
    print(found.path)
    for name, text in _description(found):
        print(f"  {name:<10}{_printable(text)}")
    parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "optimizer": {}}
    ranks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in found.state.items():
        part, _, rest = name.partition("/")
        if part.startswith("rank") and part[4:].isdecimal():
            ranks.setdefault(rest, {})[int(part[4:])] = array
        else:
            parts.setdefault(part, {})[rest or name] = array
    for part, arrays in parts.items():
        _print_tensors(part, arrays)
    if ranks:
        print(f"\neach rank's own: {_printable(_own(ranks))}")
    return 0


def _description(found: checkpoint.Checkpoint) -> list[tuple[str, str]]:
    """What a manifest says, in lines; a manifest may lack any of it but the step."""
    manifest = found.manifest
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    position = manifest.get("position", {})
    into = f", and {position['step_in_epoch']} step(s) of the next" if position.get("step_in_epoch") else ""
    options = [f"{name} {value}" for name, value in manifest.items() if name not in _NO_OPTIONS]
    lines = [
        ("recipe", manifest.get("recipe", "-")),
        ("framework", f"{manifest.get('framework', '-')} ({versions})"),
        ("position", f"step {manifest['step']}, {position.get('epoch', '-')} epoch(s) done{into}"),
        ("workers", f"{manifest.get('world_size', '-')}"),
        ("samples", f"{manifest.get('samples', '-')}, {manifest.get('global_batch_size', '-')} a step"),
        ("options", ", ".join(options) or "-"),
        ("written", f"{_written(found.path)}, {_megabytes(found.path):.2f} MB"),
    ]
    if "backend" in manifest:
        config = (
            "is in the manifest" if manifest.get("architecture") else "is not in the manifest (a class of one's own)"
        )
        lines.insert(2, ("backend", f"{manifest['backend']}; the architecture {config}"))
    return lines


def _printable(text: str) -> str:
    """A file's text without what a terminal would take as a command."""
    return text if text.isprintable() else ascii(text)


def _print_tensors(part: str, arrays: dict[str, np.ndarray]) -> None:
    size = sum(array.nbytes for array in arrays.values()) / 1e6
    print(f"\n{_printable(part)}: {len(arrays)} tensors, {sum(a.size for a in arrays.values())} values, {size:.2f} MB")
    width = max((len(name) for name in arrays), default=0)
    for name, array in sorted(arrays.items()):
        value = f"  {array.item()}" if array.ndim == 0 else ""
        print(f"  {_printable(name):<{width}}  {array.dtype}{list(array.shape)}{value}")


def _own(ranks: dict[str, dict[int, np.ndarray]]) -> str:
    """One line on what ranks keep for themselves: random states, and statistics with how far they lie apart."""
    generators = sorted({name.split("/")[1] for name in ranks if name.startswith("random/")})
    statistics = {name: list(arrays.values()) for name, arrays in ranks.items() if name.startswith("model/")}
    text = f"random states of {', '.join(generators)}" if generators else "no random states"
    size = len({rank for arrays in ranks.values() for rank in arrays})
    text = f"{size} rank(s); {text}"
    if not statistics:
        return text
    apart = {
        name: float(np.max(np.max(arrays, axis=0) - np.min(arrays, axis=0), initial=0))
        for name, arrays in statistics.items()
        if np.issubdtype(arrays[0].dtype, np.floating)
    }
    worst = max(apart, key=lambda name: apart[name], default=None)
    far = "" if worst is None else f", most apart in {worst}: {apart[worst]:.3g} (the model's are their mean)"
    return f"{text}; BatchNorm statistics, {len(statistics)} tensors{far}"

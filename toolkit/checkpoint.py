"""Checkpoints: a directory a step, `step-00000120/`, with `state.safetensors` and `manifest.json`.

Written to a temporary name, flushed to disk and renamed; never changed in place. The newest valid
one is found by reading: every file's SHA-256, the manifest's own too, stands in the manifest.
Loading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

FORMAT_VERSION = 1
_STATE, _MANIFEST = "state.safetensors", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


class DamagedCheckpoint(Exception):
    """A checkpoint's files are not what was written; the text names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole.

    Attributes:
        path: its directory.
        manifest: everything that was saved beside the arrays; plain JSON values.
        state: names to arrays.
    """

    path: Path
    manifest: dict[str, Any]
    state: dict[str, np.ndarray]


def write(directory: Path, step: int, state: Mapping[str, np.ndarray], manifest: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` into `directory`, then remove all but the `keep` newest.

    Args:
        directory: made if missing.
        step: names the checkpoint; a whole one that is there already is left as it is, a damaged one
            is set aside under another name.
        state: names to arrays.
        manifest: JSON values to keep beside them.
        keep: number of checkpoints to leave, ≥ 1.

    Returns:
        The checkpoint's path.

    Raises:
        OSError: the disk is full, read-only or gone; earlier checkpoints are untouched.
    """
    final = directory / f"step-{step:08d}"
    if final.exists():
        try:
            return read(final).path
        except DamagedCheckpoint:
            final.rename(directory / f"{final.name}.damaged-{time.time_ns()}")
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".step-{step:08d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # a killed run's, of the same process id
    try:
        temporary.mkdir()
        arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
        safetensors.numpy.save_file(arrays, temporary / _STATE)  # from the arrays' own memory
        flush(temporary / _STATE)
        content = {"format_version": FORMAT_VERSION, **manifest, "step": step}
        content["sha256"] = {_STATE: _sha256(temporary / _STATE)}
        content["sha256"][_MANIFEST] = _manifest_sha256(content)
        (temporary / _MANIFEST).write_text(json.dumps(content, indent=1))
        flush(temporary / _MANIFEST)
        flush(temporary)
        temporary.rename(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, safetensors.SafetensorError):  # what the system said is in its text
            raise OSError(str(error)) from None
        raise
    flush(directory)
    # Of later steps there are damaged ones at most, or a run resumed before them would not write this one.
    for old in [path for path in steps(directory) if _step(path) <= step][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


class Writer:
    """Writes checkpoints in a thread of its own while training goes on; one at a time.

    The state handed over must not change any more, so it takes the memory of one extra copy.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None

    def write(
        self, directory: Path, step: int, state: Mapping[str, np.ndarray], manifest: Mapping[str, Any], keep: int
    ) -> None:
        """Begin to `write`, when the one before is done.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(write, directory, step, state, manifest, keep)

    def wait(self) -> None:
        """Return when nothing is left to write.

        Raises:
            OSError: the last one could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Return when nothing is left to write, whether or not it could be."""
        self._thread.shutdown()


def steps(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first, by name alone; empty where there is no directory."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def read(path: Path) -> Checkpoint:
    """Read one checkpoint and check it against its manifest.

    Raises:
        DamagedCheckpoint: a file is missing, altered or of another format version.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            raise DamagedCheckpoint(f"{path / _MANIFEST} is not of format version {FORMAT_VERSION}")
        saved = manifest.get("sha256")
        if not isinstance(saved, dict) or saved.pop(_MANIFEST, None) != _manifest_sha256(manifest):
            raise DamagedCheckpoint(f"{path / _MANIFEST} was altered (SHA-256 differs)")
        if saved != {_STATE: _sha256(path / _STATE)}:
            raise DamagedCheckpoint(f"{path / _STATE} is not what its manifest says (SHA-256 differs)")
        return Checkpoint(path, manifest, safetensors.numpy.load_file(path / _STATE))
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise DamagedCheckpoint(f"{path} can't be read: {error}") from None


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, whole or not, rather than one that holds checkpoints."""
    return bool(_NAME.fullmatch(path.name)) or (path / _MANIFEST).exists() or (path / _STATE).exists()


def newest(directory: Path) -> Checkpoint | None:
    """The newest whole checkpoint; warns of each damaged one that it passes over."""
    found, damages = newest_whole(steps(directory))
    for damage in damages:
        warnings.warn(f"damaged checkpoint passed over: {damage}", stacklevel=2)
    return found


def newest_whole(paths: Sequence[Path]) -> tuple[Checkpoint | None, list[DamagedCheckpoint]]:
    """The last of these checkpoints, oldest first, that is whole, and what is wrong with those after it."""
    damages: list[DamagedCheckpoint] = []
    for path in reversed(paths):
        try:
            return read(path), damages
        except DamagedCheckpoint as damage:
            damages.append(damage)
    return None, damages


def flush(path: Path) -> None:
    """Have a file's content, or a directory's names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_sha256(content: Mapping[str, Any]) -> str:
    """The hash of a manifest's content without its own hash, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()

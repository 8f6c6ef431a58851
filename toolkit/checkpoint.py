"""Checkpoints: a directory a step, `step-00000120/`, with `state.safetensors` and `manifest.json`.

Written to a temporary name, flushed to disk and renamed; never changed in place. The newest valid
one is found by reading: every file's SHA-256, the manifest's own too, stands in the manifest.

The hashes tell damage, not who wrote a file. Loading runs no code, reads plain files of the checkpoint's own
directory alone, and takes nothing from them before it is seen to be of the right type and in range.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from toolkit.errors import UsageError
from toolkit.progress import say

FORMAT_VERSION = 1
_STATE, _MANIFEST = "state.safetensors", "manifest.json"
_NAME = re.compile(r"step-([0-9]{8,18})")
_TEMPORARY = re.compile(r"\.step-[0-9]{8,18}\.[0-9]+\.tmp")
WRITING = threading.Lock()  # held by whichever of this process's threads writes a checkpoint
RETRY_SECONDS = 30.0  # between attempts to write a checkpoint that could not be written
_MOST_MANIFEST_BYTES = 16 << 20  # a large model's architecture takes a few MB
_MOST = 2**53  # of a count: what a float still tells from its neighbour


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
    if os.path.lexists(final):
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
        text = json.dumps(content, indent=1)
        if len(text) > _MOST_MANIFEST_BYTES:  # which no reader would take
            raise UsageError(
                f"the manifest of a checkpoint would have {len(text)} bytes: extra objects and the model's "
                f"configuration may take {_MOST_MANIFEST_BYTES}; what is large belongs into the model as tensors."
            )
        (temporary / _MANIFEST).write_text(text)
        flush(temporary / _MANIFEST)
        flush(temporary)
        temporary.rename(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, safetensors.SafetensorError):  # what the system said is in its text
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from None
        raise
    flush(directory)
    # Of later steps there are damaged ones at most, or a run resumed before them would not write this one.
    for old in [path for path in steps(directory) if _step(path) <= step][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


class Writer:
    """Writes checkpoints in a thread of its own while training goes on; one at a time.

    The state handed over must not change any more, so it takes the memory of one extra copy. What can't be
    written is told in a line, and tried again every `RETRY_SECONDS` until it is or a newer state is to replace it.

    Args:
        prepare: called before each attempt; may raise `OSError`.
    """

    def __init__(self, prepare: Callable[[], None] = lambda: None) -> None:
        self._prepare = prepare
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._job: tuple[Path, int, Mapping[str, np.ndarray], Mapping[str, Any], int] | None = None  # not written yet
        self._no_more = threading.Event()
        self._reason = ""  # why the last attempt failed; empty after one that did not

    def write(
        self, directory: Path, step: int, state: Mapping[str, np.ndarray], manifest: Mapping[str, Any], keep: int
    ) -> None:
        """Begin to `write`; one before that could not be written is given up."""
        self.wait()
        self._job = directory, step, state, manifest, keep
        self._no_more.clear()
        self._pending = self._thread.submit(self._write_at_last)

    def wait(self) -> None:
        """Return when no attempt is under way; what could not be written is given up, and its memory free."""
        self._end_attempts()
        self._job = None

    def finish(self, tries: int = 4, seconds: float = 1.0) -> str | None:
        """Return when all is written, or could not be in so many more tries.

        Args:
            tries: after the attempt that is under way.
            seconds: between them.

        Returns:
            Why the last checkpoint could not be written; None where it was.
        """
        self._end_attempts()
        while self._job is not None and tries > 0:
            time.sleep(seconds)
            self._attempt(*self._job)
            tries -= 1
        return None if self._job is None else self._reason

    def close(self, seconds: float | None = None) -> bool:
        """Make no more attempts; return whether the one under way has ended, waiting so long for it at most."""
        self._no_more.set()
        self._thread.shutdown(wait=False)
        return self._pending is None or bool(wait([self._pending], seconds).done)

    def _end_attempts(self) -> None:
        self._no_more.set()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write_at_last(self) -> None:
        while self._job is not None:
            self._attempt(*self._job)
            if self._job is None or self._no_more.wait(RETRY_SECONDS):
                return

    def _attempt(
        self, directory: Path, step: int, state: Mapping[str, np.ndarray], manifest: Mapping[str, Any], keep: int
    ) -> None:
        try:
            self._prepare()
            with WRITING:
                path = write(directory, step, state, manifest, keep)
        except OSError as error:
            before, self._reason = self._reason, reason(error)
            if self._reason != before:  # told once, however long it stays so
                say(
                    f"warning: the checkpoint of step {step} could not be written to {directory}: {self._reason}; "
                    f"training goes on, and it, or a newer one, is tried again every {RETRY_SECONDS:g} s"
                )
        else:
            self._job = None
            if self._reason:
                say(f"checkpoints can be written again: {path}")
            self._reason = ""


def reason(error: OSError) -> str:
    """What the system said, without the paths around it."""
    return error.strerror or str(error)


def steps(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first, by name alone; empty where there is no directory."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def remove_leftovers(directory: Path) -> None:
    """Remove what killed runs left of checkpoints that they had not finished; the directory must be claimed."""
    for path in directory.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)  # which leaves symbolic links alone


def read(path: Path) -> Checkpoint:
    """Read one checkpoint and check it against its manifest.

    Raises:
        DamagedCheckpoint: a file is missing, altered, of another format version, no plain file of this
            directory, or holds what no run writes.
    """
    directory = -1
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        text = _content(_MANIFEST, directory, _MOST_MANIFEST_BYTES)
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            raise DamagedCheckpoint(f"{path / _MANIFEST} is not of format version {FORMAT_VERSION}")
        whole = text == json.dumps(manifest, indent=1).encode()  # so a 1e5 that becomes 1E5 is damage too
        saved = manifest.get("sha256")
        if not whole or not isinstance(saved, dict) or saved.pop(_MANIFEST, None) != _manifest_sha256(manifest):
            raise DamagedCheckpoint(f"{path / _MANIFEST} was altered (SHA-256 differs)")
        # Read once: what was hashed is what is used, and a file that is cut meanwhile can't be a fault in memory.
        content = _content(_STATE, directory, _memory_bytes())
        if saved != {_STATE: hashlib.sha256(content).hexdigest()}:
            raise DamagedCheckpoint(f"{path / _STATE} is not what its manifest says (SHA-256 differs)")
        strange = _strange(manifest, path)
        if strange:
            raise DamagedCheckpoint(f"{path / _MANIFEST}: {strange}, which no run writes")
        return Checkpoint(path, manifest, safetensors.numpy.load(content))
    except KeyError as error:  # of safetensors' numpy part, which knows not all of its types
        raise DamagedCheckpoint(f"{path / _STATE} has tensors of type {shown(error.args[0])}") from None
    except (OSError, ValueError, RecursionError, MemoryError, safetensors.SafetensorError) as error:
        said = reason(error) if isinstance(error, OSError) else str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            said = f"{Path(error.filename).name}: {said}"
        raise DamagedCheckpoint(f"{path} can't be read: {shown(said)}") from None
    finally:
        if directory >= 0:
            os.close(directory)


def _content(name: str, directory: int, most: int) -> bytes:
    """A plain file's bytes; nothing else is opened to the point where it could wait or have an effect."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no plain file", name)
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, more than the {most} that could be right", name)
        with open(file, "rb", closefd=False) as opened:
            return opened.read(found.st_size)  # not more, should it grow meanwhile
    finally:
        os.close(file)


def _memory_bytes() -> int:
    """Of this machine; a file that is larger, such as one of nothing but a hole, is not read."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


_POSITION: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("epoch", "step", "step_in_epoch", "not_finite"), _is_count),
    "loss_sum": lambda v: type(v) is float,
}
# What readers rely on, where it is there: the values that a run writes.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "framework": lambda v: isinstance(v, str),
    "versions": lambda v: isinstance(v, dict) and all(isinstance(version, str) for version in v.values()),
    "backend": lambda v: isinstance(v, str),
    "architecture": lambda v: v is None or isinstance(v, str),
    "bfloat16": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    "recipe": lambda v: isinstance(v, str),
    "samples": lambda v: _is_count(v, 1),
    "global_batch_size": lambda v: _is_count(v, 1),
    "world_size": lambda v: _is_count(v, 1),
    "reference_batch_size": lambda v: _is_count(v, 1),
    "reducer": lambda v: v in ("horovod", "mpi"),
    "extra": lambda v: isinstance(v, dict),
    "position": lambda v: (
        isinstance(v, dict)
        and {*v, "not_finite"} == _POSITION.keys()
        and all(_POSITION[key](value) for key, value in v.items())
    ),
}


def _strange(manifest: Mapping[str, Any], path: Path) -> str | None:
    """What is of a wrong type or out of range in a manifest; None where nothing is."""
    step = manifest.get("step")
    if not _is_count(step):
        return f"step is {shown(step)}"
    if _NAME.fullmatch(path.name) and _step(path) != step:
        return f"step is {step}"
    for key, right in _FIELDS.items():
        if key in manifest and not right(manifest[key]):
            return f"{key} is {shown(manifest[key])}"
    if "position" in manifest and manifest["position"]["step"] != step:
        return f"step is {step} and position's {manifest['position']['step']}"
    return None


def shown(value: Any) -> str:
    """A value of a file as a message shows it: on one line, of printable characters, not long."""
    text = str(value)[:100]
    return text if text.isprintable() else ascii(text)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, whole or not, rather than one that holds checkpoints."""
    return bool(_NAME.fullmatch(path.name)) or any(os.path.lexists(path / name) for name in (_MANIFEST, _STATE))


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
    """The hash of a manifest's content without its own hash."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()

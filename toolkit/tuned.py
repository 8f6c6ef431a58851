"""The file in which `hvdkit tune` keeps what it has found, and in which later runs look."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolkit import tuning
from toolkit.errors import UsageError
from toolkit.files import write_whole
from toolkit.progress import say
from toolkit.world import World

VARIABLE = "HVDKIT_TUNED"  # the path of the file to take up, or empty: none
REDUCER = "HVDKIT_REDUCER"
# The variables that such a file may set, and what they may be.
ACCEPTED = {
    "HOROVOD_CYCLE_TIME": r"\d{1,4}(\.\d{1,6})?",
    "HOROVOD_FUSION_THRESHOLD": r"\d{1,12}",
    "HOROVOD_CACHE_CAPACITY": r"\d{1,9}",
    "OMPI_MCA_mpi_yield_when_idle": "[01]",
    tuning.THREADS: "[1-9][0-9]{0,3}",
    tuning.AFFINITY: "[01]",
    REDUCER: "auto|horovod|mpi",
}
_FORMAT = 2
# Options of recipes that are no matter to a step's time; the device is told by itself.
_NO_MATTER = (
    *("--output", "--resume", "--keep", "--checkpoint-every", "--checkpoint-steps", "--commit-steps", "--print-every"),
    *("--epochs", "--max-steps", "--seed", "--learning-rate", "--warmup-epochs", "--check-sync", "--audit", "--on-nan"),
    *("--stall-timeout", "--device", "--share-gpus", "--verbose", "-v"),
)
_TEXTS = {"framework": "framework", "device": "device", "mpi": "MPI", "options": "options"}
_COUNTS = {"workers": "worker(s)", "local_workers": "worker(s) a host", "cores": "core(s) a host"}
_LONGEST = 1 << 16  # bytes; such a file has a thousand


@dataclass(frozen=True)
class Job:
    """What must be alike for a setting found in one job to be used in another.

    Attributes:
        framework: torch or tensorflow; for Keras its backend.
        workers: of the whole job.
        local_workers: on each host.
        cores: that the workers of a host may use together.
        device: cpu or gpu.
        mpi: as `tuning.mpi_of` tells it.
        options: the script's, as `options_of` has them.
    """

    framework: str
    workers: int
    local_workers: int
    cores: int
    device: str = "cpu"
    mpi: str = ""
    options: str = ""


@dataclass(frozen=True)
class Tuned:
    """What `hvdkit tune` has found.

    Attributes:
        job: where it was measured.
        environment: variables to set, names and values as in `ACCEPTED`.
        more: for its reader: command, date, host, gain; JSON values.
    """

    job: Job
    environment: Mapping[str, str]
    more: Mapping[str, Any]


def options_of(arguments: Sequence[str]) -> str:
    """A script's options that can be of matter to its speed, in an order of their own."""
    found: list[list[str]] = [[]]
    for word in arguments:
        if word.startswith("--") or word == "-v":
            found.append(word.split("=", 1))
        else:
            found[-1].append(word)
    return " ".join(sorted(" ".join(words) for words in found if words and words[0] not in _NO_MATTER))


def path_for(script: str, job: Job) -> Path:
    """Where the file for a script is, in the directory that it is run in."""
    digest = hashlib.blake2b(job.options.encode(errors="replace"), digest_size=4).hexdigest()
    options = f"-{digest}" if job.options else ""
    return Path("runs") / f"{script}.tuned-{job.framework}-np{job.workers}{options}.json"


def write(path: Path, tuned: Tuned) -> None:
    """Write the file, in place of an earlier one.

    Raises:
        UsageError: it can't be written.
    """
    content = {"format": _FORMAT, "job": asdict(tuned.job), "environment": dict(tuned.environment), **tuned.more}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2).encode() + b"\n")
    except OSError as error:
        raise UsageError(f"{path} can't be written ({error.strerror}): name another with --output.") from None


def read(path: Path) -> Tuned:
    """Read such a file.

    Raises:
        UsageError: it is not there, or is none.
    """
    try:
        found = json.loads(_content(path))
    except OSError as error:
        raise UsageError(f"{path} can't be read ({error.strerror}): name a file that hvdkit tune wrote.") from None
    except (ValueError, RecursionError):
        raise _bad(path, "it is no JSON") from None
    if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
        raise _bad(path, f'it has no "format": {_FORMAT}')
    job, environment = found.pop("job", None), found.pop("environment", None)
    if not isinstance(job, dict) or job.keys() != {*_TEXTS, *_COUNTS}:
        raise _bad(path, f"its job is {_shown(job)}")
    for name in _TEXTS:
        if not isinstance(job[name], str):
            raise _bad(path, f"its {name} is {_shown(job[name])}")
    for name in _COUNTS:
        if type(job[name]) is not int or job[name] < 1:
            raise _bad(path, f"its {name} is {_shown(job[name])}")
    if not isinstance(environment, dict):
        raise _bad(path, f"its environment is {_shown(environment)}")
    for name, value in environment.items():
        if name not in ACCEPTED:
            raise _bad(path, f"it sets {_shown(name)}, which hvdkit tune does not")
        if not isinstance(value, str) or not re.fullmatch(ACCEPTED[name], value, re.ASCII):
            raise _bad(path, f"it sets {name} to {_shown(value)}")
    return Tuned(Job(**job), environment, found)


def take_up(
    script: str, here: Job, launched: World, environ: Mapping[str, str] = os.environ
) -> tuple[Path | None, Mapping[str, str], str]:
    """What an earlier `hvdkit tune` has found for a job like this one.

    Without `HVDKIT_TUNED` it is looked for on one host alone: on several the ranks, which must have the same
    settings, might find different files.

    Args:
        script: the running script's name.
        here: this job.
        launched: this worker, as the launcher tells it.
        environ: the environment.

    Returns:
        The file, the variables that it sets, and why it is left alone, where it is.

    Raises:
        UsageError: the file that `HVDKIT_TUNED` names is none; or a job on several hosts is another than the file's.
    """
    named = environ.get(VARIABLE)
    several = launched.local_size != launched.size
    if named == "" or (named is None and several):
        return None, {}, ""
    path = Path(named) if named else path_for(script, here)
    if named is None and not os.path.lexists(path):
        return None, {}, ""
    try:
        tuned = read(path)
    except UsageError as error:
        if named:
            raise
        if launched.rank == 0:
            say(f"warning: {error}")
        return path, {}, f"{path} left alone: it can't be used"
    different = _difference(tuned.job, here)
    if different and several:
        raise UsageError(f"{path} is for {different}: take its name out of {VARIABLE}, or run hvdkit tune again.")
    if different:
        return path, {}, f"{path} left alone: it is for {different}"
    return path, tuned.environment, ""


def _difference(theirs: Job, ours: Job) -> str:
    """In what a file's job is another than this one; empty: in nothing."""
    for name, word in _TEXTS.items():
        a, b = getattr(theirs, name), getattr(ours, name)
        if a != b:
            return f"{word} {_shown(a)}, and this job has {_shown(b)}"
    for name, unit in _COUNTS.items():
        a, b = getattr(theirs, name), getattr(ours, name)
        if a != b:
            return f"{a} {unit}, and this job has {b}"
    return ""


def _content(path: Path) -> bytes:
    """What a plain file holds; one that is too long is cut, and so no JSON."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "no plain file")
        return file.read(_LONGEST)


def _bad(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is no file of hvdkit tune, as {why}: remove it, or run hvdkit tune again.")


def _shown(value: Any) -> str:
    """A value of unknown origin, short and in one line."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"

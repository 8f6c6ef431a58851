"""A cache of built wheels outside any checkout, one directory for each thing built against.

``${HVDKIT_CACHE:-${XDG_CACHE_HOME:-~/.cache}/hvdkit}/wheels/<key>/`` holds the wheels and a
``manifest.json`` with what they were built against and the SHA-256 of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

_MANIFEST = "manifest.json"


def cache_directory() -> Path:
    """Return the directory of all entries; it need not exist."""
    if os.environ.get("HVDKIT_CACHE"):
        root = Path(os.environ["HVDKIT_CACHE"]).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdkit"
    return root.absolute() / "wheels"


def recipe_hash(gpu: bool = False) -> str:
    """Return a hash of the files that decide how Horovod is compiled, for GPUs too or for CPUs alone."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    files = [*here.glob("*.cmake"), here / "build.py"]
    if gpu:
        files += [here / "cuda.py", *here.glob("*.cc")]
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_key(parts: dict[str, str]) -> str:
    """Return the name of the entry for `parts`, such as ``horovod-0.28.1-cpython-311-…-9f2c…``."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return f"horovod-{parts['horovod']}-{parts['python']}-{digest}"


def find(key: str) -> list[Path]:
    """Return the wheels of the entry `key`, each compared with its SHA-256; [] if absent or damaged."""
    entry = cache_directory() / key
    try:
        files = json.loads((entry / _MANIFEST).read_text())["sha256"]
        wheels = [entry / name for name in files]
        sound = all(_sha256(wheel) == files[wheel.name] for wheel in wheels)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return wheels if sound else []


def store(key: str, parts: dict[str, str], wheels: list[Path]) -> list[Path]:
    """Move `wheels` into the entry `key`, which appears whole or not at all, and return their new paths.

    An entry that is there and damaged is replaced; a sound one, stored meanwhile by another process, stays.
    """
    entry = cache_directory() / key
    entry.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=entry.parent))
    try:
        files = {wheel.name: _sha256(wheel) for wheel in wheels}
        for wheel in wheels:
            shutil.move(wheel, staging / wheel.name)
        manifest = {"built_against": parts, "sha256": files}
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        staging.chmod(0o755)
        if not _rename(staging, entry) and not find(key):
            discard(key)
            _rename(staging, entry)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return find(key)


def discard(key: str) -> None:
    """Remove the entry `key`, if it is there."""
    entry = cache_directory() / key
    if entry.exists():
        removed = Path(tempfile.mkdtemp(prefix=".removed-", dir=entry.parent))
        os.rename(entry, removed / "entry")
        shutil.rmtree(removed, ignore_errors=True)


def _rename(source: Path, target: Path) -> bool:
    try:
        os.rename(source, target)
    except OSError:
        if not target.exists():
            raise
        return False
    return True


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()

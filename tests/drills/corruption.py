"""Damage a real run's newest checkpoint: it is always noticed, and the one before it is used.

python -m tests.drills.corruption --times 200
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.drills.report import Drill, table
from tests.launching import launch
from toolkit import checkpoint

_EPOCHS = 6


def drills(
    times: int, *, framework: str = "torch", launcher: str = "mpirun", seed: int = 0, real: int = 6
) -> Iterator[Drill]:
    """For each kind of damage, a third of `times`; `real` of all with a launched `--resume`, the others in-process.

    Args:
        times: number of damages.
        framework: of the recipe whose run is damaged.
        launcher: of the run and of its resumption.
        seed: of where and how.
        real: number of damages that a launched `--resume` has to go round.
    """
    generator = random.Random(seed)
    recipe = f"recipes/cnn_{framework}.py"
    with tempfile.TemporaryDirectory(prefix="hvdkit-corruption-") as place:
        run = Path(place, "run")
        result = launch(2, [recipe, "--epochs", str(_EPOCHS), "--output", run], launcher=launcher)
        if result.returncode:
            raise RuntimeError(f"the run to damage failed: {result.stderr}")
        for i, damage in enumerate((_flip, _truncate, _delete)):
            share = times // 3 + (i < times % 3)
            drill = Drill(f"{damage.__doc__} the newest checkpoint", launcher, framework)
            for number in range(share):
                work = Path(place, "work")
                shutil.copytree(run, work)
                launched = number < real // 3
                _try(drill, work, damage, generator, (recipe, launcher) if launched else None)
                shutil.rmtree(work)
            yield drill


def _flip(path: Path, generator: random.Random) -> str:
    """one bit flipped in"""
    data = bytearray(path.read_bytes())
    at, bit = generator.randrange(len(data)), generator.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at}"


def _truncate(path: Path, generator: random.Random) -> str:
    """truncation of a file of"""
    length = generator.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(length)
    return f"cut to {length} bytes"


def _delete(path: Path, generator: random.Random) -> str:
    """deletion of a file of"""
    path.unlink()
    return "deleted"


def _try(drill: Drill, work: Path, damage, generator: random.Random, real: tuple[str, str] | None) -> None:
    *_, before, newest = checkpoint.steps(work)
    file = generator.choice(sorted(newest.iterdir()))
    what = f"{file.name}, {damage(file, generator)}"
    files = _hashes(work)
    drill.times += 1
    start = time.monotonic()
    if real is None:
        found, damages = checkpoint.newest_whole(checkpoint.steps(work))
        drill.seconds.append(time.monotonic() - start)
        named = [str(damage) for damage in damages]
        used = found.path if found else None
    else:
        recipe, launcher = real
        # One epoch more than the checkpoint before has: what was damaged is set aside and written again.
        command = [recipe, "--resume", "--epochs", str(_EPOCHS), "--output", work]
        result = launch(2, command, launcher=launcher)
        named = [line for line in result.stderr.splitlines() if "damaged checkpoint passed over" in line]
        used = before if f"step {int(before.name[5:])} in {work}" in result.stdout else None
        aside = next(work.glob(f"{newest.name}.damaged-*"), None)
        if result.returncode or aside is None:
            drill.failures.append(f"{what}: exit code {result.returncode}, set aside: {aside}")
        files = {path: digest for path, digest in files.items() if path.parent != newest and path.suffix != ".jsonl"}
    drill.lost_steps.append(int(newest.name[5:]) - int(before.name[5:]))
    if used != before or len(named) != 1 or newest.name not in named[0]:
        drill.failures.append(f"{what}: used {used}, said {named}")
    after = _hashes(work)
    changed = [str(path) for path in files if after.get(path) != files[path]]
    if real is not None:  # the third newest is one too many once the newest is written again
        changed = [path for path in changed if Path(path).parent in (before, newest)]
    if changed:
        drill.failures.append(f"{what}: changed {changed}")


def _hashes(directory: Path) -> dict[Path, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--framework", default="torch")
    parser.add_argument("--launcher", default="mpirun")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(table(drills(given.times, framework=given.framework, launcher=given.launcher, seed=given.seed)))

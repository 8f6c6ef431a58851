"""A plan as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import UsageError
from toolkit.plan.cost import ALL_REDUCES
from toolkit.plan.step import Training

KINDS = (".png", ".svg", ".pdf")
_TITLE = 110  # characters that fit into a line of it


def check(path: Path) -> None:
    """Raise `UsageError` where there is nothing to draw with, or no place for the file."""
    if path.suffix not in KINDS:
        raise UsageError(f"--plot {path}: give a file that ends in {', '.join(KINDS)}.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: {path.absolute().parent} is no directory: make it, or name another.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install 'hvdkit[plot]', or leave out --plot."
        ) from None


def write(path: Path, training: Training, counts: Sequence[int], title: str) -> None:
    """Draw speed and efficiency against the number of workers.

    Raises:
        UsageError: the file can't be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, efficiency = figure.subplots(1, 2)
    alone = training.best(counts[0])
    one = alone.samples_per_second / counts[0] if alone else 1.0
    for axes, ideal in ((speed, [n * one for n in counts]), (efficiency, [100.0] * len(counts))):
        axes.plot(counts, ideal, color="0.7", label="each worker as fast as one")
    for overlap in (False, True):
        for number, name in enumerate(ALL_REDUCES):
            found = [training.best(n, all_reduces=(name,), overlap=overlap) for n in counts]
            steps = [step for step in found if step]
            if not steps:
                continue
            words = {"color": f"C{number}", **_line(number, overlap)}
            words["label"] = f"{name}{', overlap' if overlap else ''}"
            speed.plot([s.workers for s in steps], [s.samples_per_second for s in steps], **words)
            efficiency.plot([s.workers for s in steps], [100 * s.efficiency for s in steps], **words)
    for axes, label in ((speed, "samples a second"), (efficiency, "efficiency, %")):
        axes.set(xscale="log", xlabel="workers", ylabel=label, xticks=counts)
        axes.set_xticks(counts, [str(n) for n in counts], rotation=60)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    speed.set(yscale="log")
    efficiency.set(ylim=(0, 105))
    efficiency.legend(fontsize="small", handlelength=4)
    figure.suptitle(textwrap.fill(title, _TITLE), fontsize="medium")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"--plot {path}: {error.strerror}: name a file that can be written.") from None


def _line(number: int, overlap: bool) -> dict[str, Any]:
    """How a line looks beside others that it may run along: pale bands, each narrower; on them dashes, in turns."""
    if not overlap:
        return {"linewidth": 2.5 * (len(ALL_REDUCES) - number), "alpha": 0.4, "solid_capstyle": "butt"}
    gap = 3.0 * (len(ALL_REDUCES) - 1)
    return {"linewidth": 1.5, "linestyle": (3.0 * number, (3.0, gap)), "dash_capstyle": "butt"}

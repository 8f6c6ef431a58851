"""The benchmark's results as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen

import matplotlib.pyplot as plt  # noqa: E402 - the backend comes first

from tests.benchmarks import groups, report  # noqa: E402
from tests.benchmarks.models import BATCH, MODELS  # noqa: E402

COLOURS = {
    groups.OURS: "#0b5fa5",
    groups.RUN: "#5aa5e0",
    groups.HOROVOD: "#d1495b",
    groups.DDP: "#e8a33d",
    groups.DDP_PLAIN: "#f3cf8e",
    groups.DDP_MPI: "#8a5a00",
    groups.MULTI_WORKER: "#e8a33d",
    groups.FLOOR: "#9a9a9a",
    groups.KERAS["tensorflow"]: "#0b5fa5",
    groups.KERAS["torch"]: "#5aa5e0",
    groups.FIT["tensorflow"]: "#9a9a9a",
    groups.FIT["torch"]: "#c9c9c9",
}


def draw(results: Mapping[str, Any], directory: Path) -> None:
    """Write targets.png, step_time.png and scaling.png."""
    for name, function in {"targets": _targets, "step_time": _step_time, "scaling": _scaling}.items():
        figure = function(results)
        if figure is not None:
            figure.savefig(directory / f"{name}.png", dpi=120)
            plt.close(figure)


def _targets(results: Mapping[str, Any]) -> Any:
    """Each target's ratio, as a share of its limit; the line goes to the worst round."""
    found = [(target, report.measured(results, target)) for target in groups.TARGETS]
    found = [(target, values) for target, values in found if values is not None]
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(10, 1.3 + 0.3 * len(found)), layout="constrained")
    for i, (target, (_, ratio, worst)) in enumerate(reversed(found)):
        colour = "#2a7f4f" if ratio <= target.limit else "#d1495b"
        axes.plot([ratio / target.limit, worst / target.limit], [i, i], color=colour, linewidth=1.5)
        axes.plot(ratio / target.limit, i, "o", color=colour)
        axes.annotate(f"{ratio:.2f} of {target.limit:.2f}", (1, i), (1.01, i), ("axes fraction", "data"), va="center")
    axes.set_yticks(range(len(found)), [target.text for target, _ in reversed(found)])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ends = axes.get_xlim()
    axes.set_xticks(
        [tick for tick in (0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20) if ends[0] <= tick <= ends[1]]
    )
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("measured / aimed at")
    axes.set_title(
        "Targets, 2 ranks: met at 1 or less; the line goes to the worst round", loc="right", fontsize="medium"
    )
    axes.grid(axis="x", alpha=0.3)
    return figure


def _step_time(results: Mapping[str, Any]) -> Any:
    """Step times with 2 ranks as multiples of the floor's."""
    with_two = {
        framework: [model for model in MODELS if report.group_of(results, framework, model, 2)]
        for framework in groups.FRAMEWORKS
    }
    with_two = {framework: models for framework, models in with_two.items() if models}
    if not with_two:
        return None
    figure, rows = plt.subplots(
        len(with_two), 1, figsize=(12, 3.2 * len(with_two)), layout="constrained", squeeze=False
    )
    for axes, (framework, models) in zip(rows[:, 0], with_two.items(), strict=True):
        contestants = [c.name for c in groups.CONTESTANTS[framework] if c.talks and c.name in COLOURS]
        width = 0.8 / len(contestants)
        for place, name in enumerate(contestants):
            _bars(axes, results, framework, models, name, place * width - 0.4 + width / 2, width)
        axes.axhline(1, color="#9a9a9a", linewidth=1.5)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_xticks(range(len(models)), [MODELS[model].title.replace(" ", "\n", 1) for model in models])
        axes.set_ylabel("× the floor's step time")
        axes.set_title(f"{framework}, 2 ranks: step time over that of processes that do not communicate")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        axes.grid(axis="y", alpha=0.3)
    return figure


def _bars(
    axes: Any, results: Mapping[str, Any], framework: str, models: list[str], name: str, shift: float, width: float
):
    """One contestant's bars, with lines from its best round to its worst."""
    places, heights, below, above = [], [], [], []
    for i, model in enumerate(models):
        found = report.group_of(results, framework, model, 2)
        floor = found.get(report.floor_of(name))
        if not floor or not floor["milliseconds_per_step"] or not found.get(name, {}).get("milliseconds_per_step"):
            continue
        times, unit = found[name]["milliseconds_per_step"], report.median(floor)
        middle = report.median(found[name]) / unit
        places.append(i + shift)
        heights.append(middle)
        below.append(middle - min(times) / unit)
        above.append(max(times) / unit - middle)
    if places:  # from the floor up
        line = {"yerr": [below, above], "error_kw": {"elinewidth": 1}}
        axes.bar(places, [height - 1 for height in heights], width, 1, color=COLOURS[name], label=name, **line)


def _scaling(results: Mapping[str, Any]) -> Any:
    """Samples a second by the number of ranks."""
    frameworks = [f for f in groups.FRAMEWORKS if any(group["framework"] == f for group in results["groups"])]
    models = [m for m in MODELS if any(group["model"] == m for group in results["groups"])]
    size = (1 + 3.1 * len(models), 0.6 + 2.8 * len(frameworks))
    figure, panels = plt.subplots(len(frameworks), len(models), figsize=size, layout="constrained", squeeze=False)
    for row, framework in zip(panels, frameworks, strict=True):
        for axes, model in zip(row, models, strict=True):
            _lines(axes, results, framework, model)
            axes.set_title(f"{framework}: {MODELS[model].title}", fontsize="small")
            axes.set_xticks(groups.RANKS)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("samples a second")
        row[-1].legend(*_handles(row), fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in panels[-1]:
        axes.set_xlabel(f"ranks, on {results['machine']['cores']} cores")
    return figure


def _lines(axes: Any, results: Mapping[str, Any], framework: str, model: str) -> None:
    for contestant in groups.CONTESTANTS[framework]:
        points = []
        for ranks in groups.RANKS:
            found = report.group_of(results, framework, model, ranks).get(contestant.name)
            if found and found["milliseconds_per_step"]:
                points.append((ranks, 1000 * ranks * BATCH / report.median(found)))
        if points:
            style = "o-" if contestant.talks else "s--"
            axes.plot(*zip(*points, strict=True), style, color=COLOURS[contestant.name], label=contestant.name, ms=4)


def _handles(row: Any) -> tuple[list[Any], list[str]]:
    """One entry of the legend for each contestant of a row of panels."""
    found = {label: line for axes in row for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)

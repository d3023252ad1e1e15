"""The roll-out's results as a chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.rollout.contenders import CONTENDERS
from bench.stats import Sample

COLOURS = {
    contender.name: colour for contender, colour in zip(CONTENDERS, ("#1b6b49", "#9a9a9a", "#2f9e6e", "#f2a541"))
}
PANELS = {
    "seconds": ("wall, s", ("unchanged, small", "unchanged, large")),
    "serving": ("until the new GPU serves, s", ("add, limited", "add")),
    "host_cpu": ("CPU on all hosts, s", ("unchanged, large", "add, limited", "add")),
}


def draw(machine: Mapping[str, Any], results: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw the chart into `folder`; return its name in a list."""
    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "gpufleet", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 3.4), layout="constrained")
    for panel, (measure, (title, scenarios)) in zip(axes, PANELS.items()):
        _bars(panel, title, {name: results[name] for name in scenarios if name in results}, measure)
    axes[0].legend(fontsize=7)
    where = f"{machine['date']}, controller and hosts on {machine['cores']} cores of {machine['cpu']}"
    figure.supxlabel(where, x=1, ha="right", fontsize=6, color="#666666")
    figure.savefig(folder / "rollout.svg", metadata={"Date": None})
    pyplot.close(figure)
    return ["rollout.svg"]


def _bars(axes: Axes, title: str, groups: Mapping[str, Mapping[str, Mapping[str, list[float]]]], measure: str) -> None:
    """Medians of the contenders side by side for each scenario, with a line from the lowest to the highest round."""
    width = 0.8 / len(COLOURS)
    for place, (name, colour) in enumerate(COLOURS.items()):
        samples = [Sample(tuple(figures[name][measure])) for figures in groups.values()]
        lines = [[one.median - one.low for one in samples], [one.high - one.median for one in samples]]
        where = [number + place * width for number in range(len(samples))]
        axes.bar(where, [one.median for one in samples], width, yerr=lines, color=colour, label=name)
    axes.set_xticks([number + 0.4 - width / 2 for number in range(len(groups))], list(groups))
    axes.set_title(title, fontsize=9)

"""The gateway's results as charts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.gateway.contenders import CONTENDERS
from bench.stats import Sample

PALETTE = ("#9a9a9a", "#4c78a8", "#f2a541", "#2f9e6e", "#1b6b49")
COLOURS = {
    "direct": "#dddddd",
    **{contender.name: colour for contender, colour in zip(CONTENDERS, PALETTE)},
}


def draw(machine: Mapping[str, Any], results: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw all charts into `folder`; return their names."""
    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "gpufleet", "svg.fonttype": "none", "font.size": 9})
    charts = {"gateway-load.svg": _load, "gateway-latency.svg": _latency, "gateway-size.svg": _size}
    where = f"{machine['date']}, {machine['cores']} cores of {machine['cpu']}, simulated GPUs"
    for name, plot in charts.items():
        figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
        plot(list(axes), results)
        figure.supxlabel(where, x=1, ha="right", fontsize=6, color="#666666")
        figure.savefig(folder / name, metadata={"Date": None})
        pyplot.close(figure)
    return list(charts)


def _bars(axes: Axes, title: str, groups: Mapping[str, Mapping[str, list[float]]], factor: float = 1) -> None:
    """Bars of contenders side by side for each group: medians, with a line from the lowest to the highest round."""
    names = [name for name in COLOURS if all(name in by_name for by_name in groups.values())]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        for number, by_name in enumerate(groups.values()):
            sample = Sample(tuple(value * factor for value in by_name[name]))
            error = [[sample.median - sample.low], [sample.high - sample.median]]
            label = name if number == 0 else None
            axes.bar(number + place * width, sample.median, width, color=COLOURS[name], label=label, yerr=error)
    axes.set_xticks([number + 0.4 - width / 2 for number in range(len(groups))], list(groups))
    axes.set_title(title, fontsize=9)


def _of(figures: Mapping[str, Mapping[str, list[float]]], measure: str) -> dict[str, list[float]]:
    return {name: seen[measure] for name, seen in figures.items() if measure in seen}


def _load(axes: list[Axes], results: Mapping[str, Any]) -> None:
    use = {behaviour: _of(figures, "slot_use") for behaviour, figures in results["overload"].items()}
    _bars(axes[0], "use of slots at 1.5 times the load, %", use, 100)
    axes[0].axhline(98, color="#444444", linewidth=0.8, linestyle="--")
    axes[0].set_ylim(80, 101)
    axes[0].legend(fontsize=7, loc="lower right")
    _bars(axes[1], "24 at once: served without coming again, %", {"": _of(results["burst"], "served_at_once")}, 100)
    _bars(axes[2], "fairness of 24 clients: Jain's index", {"": _of(results["fairness"], "jain")})


def _latency(axes: list[Axes], results: Mapping[str, Any]) -> None:
    panels = (("latency", "whole", "an answer"), ("latency", "first_byte", "first byte of a stream"))
    for panel, (scenario, measure, title) in zip(axes, (*panels, ("refusal", "refusal", "a refusal"))):
        seen = {percent: _of(results[scenario], f"{measure}_{percent}") for percent in ("p50", "p99")}
        _bars(panel, f"{title}, ms", seen, 1e3)
    axes[0].legend(fontsize=7)


def _size(axes: list[Axes], results: Mapping[str, Any]) -> None:
    panels = (
        ("reload", "reload, s"),
        ("memory_mib", "memory (PSS), MiB"),
        ("cpu_microseconds", "CPU for a request, µs"),
    )
    sizes = [int(instances) for instances in results["size"]]
    for panel, (measure, title) in zip(axes, panels):
        for contender in CONTENDERS:
            name = contender.name
            medians = [Sample(tuple(figures[name][measure])).median for figures in results["size"].values()]
            panel.plot(sizes, medians, marker="o", markersize=3, color=COLOURS[name], label=name)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("instances")
        panel.set_title(title, fontsize=9)
    axes[0].legend(fontsize=7)

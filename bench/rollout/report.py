"""The roll-out's results as text: one table for each scenario."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.report import Unit, origin, table
from bench.rollout.contenders import GPUFLEET, PYINFRA, STOCK
from bench.stats import Sample

UNITS = {
    "serving": Unit("serving after, s", 1, 1),
    "seconds": Unit("whole run, s", 1, 1),
    "host_cpu": Unit("CPU on all hosts, s", 1, 1),
    "controller_cpu": Unit("CPU on the controller, s", 1, 1),
}
TITLES = {
    "unchanged, small": "Nothing to change: 3 GPU hosts of 2 GPUs",
    "unchanged, large": "Nothing to change: 20 GPU hosts",
    "add": "A host more: the whole site.yml, 19 hosts run",
    "add, limited": "A host more: `--limit newhost,gateways`",
}
LEFT_OUT = (
    "comparing what was unpacked with its manifest, file by file",
    "asking the running Supervisor and nginx whether they run what the files say",
    "putting back what does not come up, and a trial request",
    "drains, and the replacing of running programs card by card",
    "the lock against a second run, and the preflight of inventory and hosts",
    "deriving and rendering: its files are those that gpufleet has put on the hosts",
)

Results = Mapping[str, Mapping[str, Mapping[str, list[float]]]]


def document(machine: Mapping[str, Any], results: Results, charts: list[str]) -> str:
    """The whole report."""
    parts = [
        "# The roll-out beside other ways to do it",
        f"{origin(machine, 'bench-rollout')} Controller and hosts share these cores: "
        "on machines of their own the hosts work side by side, and wall times are shorter. CPU seconds say more.",
        "Hosts are containers of the test bed, reached over ssh; every run begins with no connection open. One "
        "gateway; the service is the project's own with its simulated engine. All contenders in turn, in another order "
        "every round; every figure is the median of the rounds, in brackets the lowest and the highest. CPU on the "
        "hosts is without what they use at rest.",
        "- **gpufleet**: site.yml with the project's ansible.cfg.\n"
        "- **stock ansible.cfg**: the same playbook with Ansible's defaults (5 forks, no pipelining).\n"
        "- **gpufleet with Mitogen**: the same playbook, Mitogen's strategy plugin.\n"
        f"- **pyinfra**: a [deploy](../../bench/rollout/pyinfra_deploy.py) of the same steps. It ends with the same "
        f"files, and what one has rolled out the others find unchanged. What it does not do: {'; '.join(LEFT_OUT)}.",
        *(f"![{chart.removesuffix('.svg')}]({chart})" for chart in charts),
    ]
    for scenario, title in _measured(results).items():
        parts += [f"## {title}", _table(results[scenario])]
        if scenario.startswith("add"):
            parts.append(
                "The new host is a bare machine with its Debian packages in apt's cache. Serving: the gateway listens "
                "for the new GPU in its upstream, and its page calls it ready."
            )
    if "note" in machine:
        parts.insert(2, machine["note"])
    if machine["load_before"] > machine["cores"] / 2:
        parts.insert(2, "**The machine was busy with other work meanwhile**: wall times are too long and uneven.")
    if "from bare" in results:
        bare = [f"{seen[0]:.0f} s on {name} hosts" for name, seen in results["from bare"][GPUFLEET.name].items()]
        parts += ["## From bare machines", f"gpufleet, once: {', '.join(bare)}."]
    parts += ["## In short", "\n".join(f"- {line}" for line in summary(results))]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> list[str]:
    """How gpufleet compares, in a line for each scenario."""
    lines = []
    for scenario, title in _measured(results).items():
        measure = "serving" if scenario.startswith("add") else "seconds"
        medians = {name: Sample(tuple(seen[measure])).median for name, seen in results[scenario].items()}
        ours, stock, rival = (medians[one.name] for one in (GPUFLEET, STOCK, PYINFRA))
        lines.append(
            f"{title}: {ours:.0f} s, {stock / ours:.1f} times as fast as a stock ansible.cfg; "
            f"pyinfra takes {rival:.0f} s."
        )
    return lines


def _measured(results: Results) -> dict[str, str]:
    """Titles of the scenarios that there was time for."""
    return {scenario: title for scenario, title in TITLES.items() if scenario in results}


def _table(figures: Mapping[str, Mapping[str, list[float]]]) -> str:
    measures = [measure for measure in UNITS if any(measure in seen for seen in figures.values())]
    rows = [[name, *(UNITS[measure].show(seen[measure]) for measure in measures)] for name, seen in figures.items()]
    return table(["", *(UNITS[measure].heading for measure in measures)], rows)

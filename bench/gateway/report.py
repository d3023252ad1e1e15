"""The gateway's results as text: one table for each scenario, and the goals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.gateway.contenders import GPUFLEET, GPUFLEET_QUEUE
from bench.gateway.ideal import IDEAL
from bench.gateway.scenarios import GUARDED, KEPT, NEW
from bench.report import Goal, Unit, origin, table
from bench.stats import Sample

US = GPUFLEET.name
OURS = (US, GPUFLEET_QUEUE.name)
ONE_TIER = "one-tier nginx"
BEHAVIOURS = {"as told": "clients that wait as Retry-After says", "naive": "clients that ask again after 0.2 s"}

COUNT = Unit("")
UNITS = {
    "whole_p50": Unit("whole answer p50, ms", 1e3, 2),
    "whole_p99": Unit("p99, ms", 1e3, 2),
    "first_byte_p50": Unit("first byte of a stream p50, ms", 1e3, 2),
    "first_byte_p99": Unit("p99, ms", 1e3, 2),
    "refusal_p50": Unit("refusal p50, ms", 1e3, 2),
    "refusal_p99": Unit("p99, ms", 1e3, 2),
    "slot_use": Unit("use of slots, %", 100, 1),
    "most_running": Unit("most on one GPU"),
    "refused_per_served": Unit("refusals for each answer", 1, 2),
    "broken": Unit("broken"),
    "served_at_once": Unit("served without coming again, %", 100, 0),
    "seconds_until_all_served": Unit("all served after, s", 1, 2),
    "wait_p50": Unit("wait p50, s", 1, 2),
    "wait_p95": Unit("p95, s", 1, 2),
    "idle": Unit("slots idle meanwhile, %", 100, 0),
    "jain": Unit("Jain's index", 1, 2),
    "least": Unit("answers of the least served"),
    "most": Unit("of the most served"),
    "per_second": Unit("requests a second", 1, 0),
    "cpu_microseconds": Unit("gateway's CPU for each, µs", 1, 0),
    "failed": Unit("refused or broken"),
    "render": Unit("render, s", 1, 2),
    "configuration_bytes": Unit("configuration, KB", 1e-3, 0),
    "check": Unit("validate, s", 1, 3),
    "reload": Unit("reload, s", 1, 3),
    "memory_mib": Unit("memory (PSS), MiB", 1, 0),
    "whole": Unit("answer p50, ms", 1e3, 2),
}
TEXTS = {
    "latency": "One client, one tiny request at a time over a kept connection, all in turn. `direct, again` shows the "
    "noise: it is the same as `direct`, one GPU. `GPUs` are all six in turn, as behind a gateway, but without one.",
    "refusal": "All slots are held, and HAProxy's queue is full. A new connection for each request.",
    "overload": "1.5 times as many users as can be served come at random; one who is refused gives up after 5 s. Work "
    "of 0.4 to 0.6 s. Time of refusals includes a load generator that shares the two cores. The last row is calculated "
    "for the same users: the most that a gateway without a queue could reach if it and its clients took no time.",
    "burst": "24 requests at once on 12 slots, by clients who do not come again, and by others who do, as Retry-After "
    "says: what these wait for, and how idle the slots are until the last of them is served.",
    "fairness": "24 clients on 12 slots, each of whom always wants one more.",
    "throughput": "Tiny requests over 6 kept connections of one client, by wrk, through to the simulated GPUs.",
    "size": "The same GPUs behind so many instances; CPU and requests a second as in throughput.",
}

Results = Mapping[str, Any]


def document(machine: Mapping[str, Any], results: Results, charts: list[str]) -> str:
    """The whole report."""
    parts = [
        "# The gateway beside its rivals",
        f"{origin(machine, 'bench-gateway')} Clients, gateway and GPUs share these cores.",
        "Six simulated GPUs of two slots each on loopback, each a Gunicorn with an app that sleeps and keeps a ledger; "
        "what runs on a GPU is counted there. gpufleet is the configuration that the roles render, with the slot guard "
        "in front of the app, once without and once with two places to wait at each GPU; the rivals have the app "
        "alone. Every figure is the median of the rounds, in brackets the lowest and the highest. The article's "
        "configuration is made loadable and otherwise as published; it runs one nginx worker. Rivals: "
        "[bench/gateway/rivals](../../bench/gateway/rivals).",
        "## Goals",
        table(
            ["goal", "measured", "met"],
            [[goal.text, goal.measured, "yes" if goal.met else "**no**"] for goal in goals(results)],
        ),
        *(f"![{chart.removesuffix('.svg')}]({chart})" for chart in charts),
    ]
    for scenario, figures in results.items():
        parts += [f"## {scenario.capitalize()}", TEXTS[scenario]]
        if scenario == "overload":
            for behaviour, by_contender in figures.items():
                parts += [f"With {BEHAVIOURS[behaviour]}:", _table(by_contender)]
        elif scenario == "size":
            for instances, by_contender in figures.items():
                parts += [f"{instances} instances:", _table(by_contender)]
        else:
            parts.append(_table(figures))
        if scenario == "latency":
            parts.append(_where_time_goes(figures))
    return "\n\n".join(parts) + "\n"


def _table(figures: Mapping[str, Mapping[str, list[float]]]) -> str:
    measures = [measure for measure in UNITS if any(measure in seen for seen in figures.values())]
    rows = [
        [name, *(UNITS[measure].show(seen[measure]) if measure in seen else "" for measure in measures)]
        for name, seen in figures.items()
    ]
    return table(["", *(UNITS[measure].heading for measure in measures)], rows)


def _where_time_goes(figures: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Why gpufleet takes longer than one tier of nginx, from what was measured on the way."""
    at = {name: 1e3 * _median(seen["whole_p50"]) for name, seen in figures.items()}
    return (
        f"Where the {at[US] - at[ONE_TIER]:.2f} ms go that gpufleet takes longer than one-tier nginx: "
        f"{at[NEW] - at[KEPT]:.2f} ms are a connection of its own for each inference, most of it Python's work on the "
        f"GPU host; {at[GUARDED] - at[NEW]:.2f} ms are the slot guard; and {at[US] - at[GUARDED]:.2f} ms are two tiers "
        f"of nginx that connect anew, where one that does not takes {at[ONE_TIER] - at[KEPT]:.2f} ms. "
        "Each is the price of a promise. A kept connection to a host that has lost its power would hold a request for "
        "its whole time limit, and one that its other end closes just then would fail a request that never started. "
        "The inner tier counts exactly through reloads, and the guard holds a slot until the work is over. With these, "
        "1.3 times one-tier nginx is out of reach."
    )


def _median(rounds: list[float]) -> float:
    return Sample(tuple(rounds)).median


def goals(results: Results) -> list[Goal]:
    """What was hoped for."""
    made = []
    for behaviour, figures in results["overload"].items():
        use = {name: Sample(tuple(seen["slot_use"])) for name, seen in figures.items()}
        rival = max((name for name in use if name not in (*OURS, IDEAL)), key=lambda name: use[name].median)
        for us in OURS:
            text = f"{us}: use of slots, {BEHAVIOURS[behaviour]}"
            made += [
                Goal(f"{text}: 98 % or more", f"{use[us].median:.1%}", use[us].median >= 0.98),
                Goal(
                    f"{text}: no rival has more, beyond noise",
                    f"{use[us].median:.1%}; {rival} {use[rival].median:.1%}",
                    use[us].high >= use[rival].low,
                ),
            ]
        made.append(
            Goal(
                f"{US}: use of slots, {BEHAVIOURS[behaviour]}: 98 % or more of what there is without a queue",
                f"{use[US].median:.1%}; at best {use[IDEAL].median:.1%}",
                use[US].median >= 0.98 * use[IDEAL].median,
            )
        )
    peaks = [seen[us]["most_running"] for seen in (*results["overload"].values(), results["burst"]) for us in OURS]
    most = max(max(rounds) for rounds in peaks)
    made.append(Goal("never more than 2 on one GPU", f"{most:.0f}", most <= 2))
    refusals = _median(results["refusal"][US]["refusal_p99"])
    made.append(Goal("refusal p99 below 5 ms", f"{refusals * 1e3:.2f} ms", refusals < 0.005))
    latency = {name: _median(seen["whole_p50"]) for name, seen in results["latency"].items()}
    added, one_tier = latency[US] - latency["direct"], latency[ONE_TIER] - latency["direct"]
    made += [
        Goal("added latency p50 below 1 ms", f"{added * 1e3:.2f} ms", added < 0.001),
        Goal(
            "added latency p50 at most 1.3 times that of one-tier nginx",
            f"{added * 1e3:.2f} ms; {one_tier * 1e3:.2f} ms",
            added <= 1.3 * one_tier,
        ),
    ]
    first = {name: _median(seen["first_byte_p50"]) for name, seen in results["latency"].items()}
    late = first[US] - first["direct"]
    made.append(Goal("first byte of a stream at most 2 ms later than direct", f"{late * 1e3:.2f} ms", late <= 0.002))
    return made

"""`moetrain bench plan --trace RUN`: the recorded loads of a run through every planner, with the run's own costs.

R ranks, E experts.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrain import config
from moetrain.bench.plan import time_planner
from moetrain.bench.tables import Records, Results, Tabulated
from moetrain.common import disk
from moetrain.config import ConfigError
from moetrain.engine.saved_costs import COSTS
from moetrain.moe import calibrate
from moetrain.moe.planning import PLANNERS
from moetrain.moe.planning.cost import Costs, Limits, State, layer_time
from moetrain.moe.planning.eplb import remember
from moetrain.moe.planning.plan import Floats, Ints, imbalance
from moetrain.observe.collect import trace

RECORDED = "as recorded"
COLUMNS = ("planner", "max/mean", "worst", "guests", "rows crossing", "predicted ms", "saved", "µs")
LEGEND = "Means over layers and samples; predicted: forward and backward of a layer on the run's machine."
TIMED = 20  # layers that a planner's time is taken from


class RecordedLayer(NamedTuple):
    """One layer in one step."""

    counts: Ints  # [R, E] rows of each source rank
    home: Ints  # [E] the rank that owns each expert
    placed: Ints  # [R, E] rows that each rank computed
    crossing: int  # rows computed on another rank than their source
    past: Floats | None  # [E] rows of earlier samples, the later the heavier


def iterate_samples(part: dict[str, Any]) -> Iterator[RecordedLayer]:
    """Yield the samples of a part of a trace, all of one layer before the next layer's."""
    for layer in range(part["counts"].shape[1]):
        past: Floats | None = None
        for n in range(len(part["step"])):
            owner = part["owner"][n, layer].astype(np.int64)
            some = owner >= 0
            counts, placed = (part[name][n, layer][:, some].astype(np.int64) for name in ("counts", "placed"))
            traffic = part["traffic"][n, layer]
            yield RecordedLayer(counts, owner[some], placed, int(traffic.sum() - traffic.trace()), past)
            past = remember(past, counts)


def replay_trace(run: Path) -> Records:
    """Return one record for what was recorded and for every planner. Raises `ConfigError` where there is no trace."""
    parts = list(trace.read_parts(run))
    if not parts:
        raise ConfigError(f"--trace {run}: has no load trace that can be read (track.trace_every=0 keeps none)")
    costs = calibrate.of_tree(disk.read_json(run / COSTS))
    if costs is None:
        raise ConfigError(f"--trace {run}: its {COSTS} is missing or damaged")
    own = config.load_resolved(run / "config.yaml").planner
    found = [_sum_up_recorded(parts)]
    for name in PLANNERS:
        options = own.options if name == own.name else config.load([f"planner={name}"]).planner.options
        found.append(_plan_again(name, options, parts, costs))
    home = next(r for r in found if r["planner"] == "home")["predicted_ms"]
    return [{**r, "saved_percent": r["predicted_ms"] and 100 * (1 - r["predicted_ms"] / home)} for r in found]


def _make_record(planner: str, imbalances: list[float], guests: int, crossing: int, rows: int) -> dict[str, Any]:
    return {
        "planner": planner,
        "layers": len(imbalances),
        "imbalance": statistics.mean(imbalances),
        "imbalance_worst": max(imbalances),
        "guests": guests / len(imbalances),
        "rows_crossing_fraction": crossing / max(rows, 1),
        "predicted_ms": None,
        "plan_us": None,
    }


def _sum_up_recorded(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the plans that the run followed."""
    imbalances, guests, crossing, rows = [], 0, 0, 0
    for sample in (s for part in parts for s in iterate_samples(part)):
        away = sample.home[None, :] != np.arange(len(sample.counts))[:, None]
        imbalances.append(imbalance(sample.placed.sum(1)))
        guests += int(((sample.placed > 0) & away).sum())
        crossing += sample.crossing
        rows += int(sample.counts.sum())
    return _make_record(RECORDED, imbalances, guests, crossing, rows)


def _plan_again(name: str, options: dict[str, Any], parts: list[dict[str, Any]], costs: Costs) -> dict[str, Any]:
    """Return the record of what a planner makes of the recorded counts, with the limits that held then."""
    imbalances: list[float] = []
    times: list[float] = []
    guests, crossing, rows, seconds = 0, 0, 0, 0.0
    for part in parts:
        known = Limits(*(None if n == trace.NO_LIMIT else int(n) for n in part["limits"]))
        machine = replace(costs, lends=int(part["lends"][0]))
        for sample in iterate_samples(part):
            state = State(past=sample.past)
            plan_once = partial(PLANNERS[name], sample.counts, sample.home, machine, known, state, **options)
            plan = plan_once()
            if len(times) < TIMED:
                times.append(time_planner(plan_once)[1])
            imbalances.append(imbalance(plan.loads()))
            guests += len(plan.guests())
            crossing += plan.crossing()
            rows += int(sample.counts.sum())
            seconds += layer_time(plan, sample.counts, sample.home, machine).total
    return {
        **_make_record(name, imbalances, guests, crossing, rows),
        "predicted_ms": 1e3 * seconds / len(imbalances),
        "plan_us": 1e6 * statistics.median(times),
    }


def tabulate(found: Records, run: Path) -> Results:
    """Return the results as a table; what was not predicted is left open."""
    rows = [
        [
            r["planner"],
            f"{r['imbalance']:.3f}",
            f"{r['imbalance_worst']:.3f}",
            f"{r['guests']:.1f}",
            f"{r['rows_crossing_fraction']:.1%}",
            *(
                "–" if r[key] is None else f"{r[key]:,.{digits}f}{unit}"
                for key, digits, unit in (("predicted_ms", 3, ""), ("saved_percent", 1, " %"), ("plan_us", 0, ""))
            ),
        ]
        for r in found
    ]
    title = f"{run}: {found[0]['layers']:,} recorded layers"
    return Results("plan", "Planners under recorded loads", found, [Tabulated(title, COLUMNS, rows)], [LEGEND])

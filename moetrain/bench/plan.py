"""`moetrain bench plan`: how long each planner takes, and how good its plans are on the reference machine.

R ranks, E experts. All loads are drawn with a fixed seed; EPLB sees another sample of the same distribution as past.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from moetrain.common.console import console
from moetrain.moe.planning import PLANNERS, default_home
from moetrain.moe.planning.cost import State, default_costs, layer_time
from moetrain.moe.planning.plan import Floats, Plan, imbalance

SIZES = ((4, 16), (8, 128), (64, 512))  # R, E
ROWS = 32768 * 4  # per rank: the LLEP paper's tokens and top-k
TINY_ROWS = 8
CALLS, SECONDS = 15, 0.2  # timed calls of a planner: so many, or as many as fit into that time


def shares(num_ranks: int, num_experts: int, seed: int = 0) -> dict[str, Floats]:
    """For each scenario [R, E], how a source's rows spread over experts; each row sums to one."""
    rng = np.random.default_rng(seed)
    even = np.full((num_ranks, num_experts), 1 / num_experts)
    ranks, per_rank = np.arange(num_ranks), num_experts // num_ranks

    def hot(share: float, experts: Any) -> Floats:
        """`share` of every source's rows evenly into `experts`, given for all sources or one for each."""
        into = np.zeros_like(even)
        into[ranks[:, None], experts] = 1
        return (1 - share) * even + share * into / into.sum(1, keepdims=True)

    found = {"balanced": even}
    for percent in (30, 50, 80, 95):
        for num_hot in sorted({1, 4, num_experts // 4}):
            found[f"{percent} % into {num_hot}"] = hot(percent / 100, np.arange(num_hot))
    zipf = rng.permutation(1 / np.arange(1, num_experts + 1) ** 1.1)
    favourites = np.stack([rng.permutation(num_experts)[:4] for _ in ranks])
    return {
        **found,
        "zipf": np.tile(zipf / zipf.sum(), (num_ranks, 1)),
        "domain skew": hot(0.7, favourites),  # every source has four favourites
        "dirichlet": rng.dirichlet(np.full(num_experts, 0.3), num_ranks),
        "one hot expert a rank": hot(0.8, np.arange(0, num_experts, per_rank)),  # lopsided experts, balanced ranks
        "each source: an expert next door": hot(0.8, ((ranks[:, None] + 1) % num_ranks) * per_rank),
        "hot experts share a home": hot(0.8, np.arange(per_rank)),
        "tiny batch": hot(0.5, np.arange(4)),
    }


def records() -> list[dict[str, Any]]:
    """One record for each size, scenario and planner."""
    return [record for size in SIZES for record in measure(*size)]


def measure(num_ranks: int, num_experts: int) -> list[dict[str, Any]]:
    home, costs = default_home(num_experts, num_ranks), default_costs()
    rng = np.random.default_rng(1)
    out: list[dict[str, Any]] = []
    for scenario, share in shares(num_ranks, num_experts).items():
        rows = TINY_ROWS if scenario == "tiny batch" else ROWS
        past, counts = (np.stack([rng.multinomial(rows, p) for p in share]) for _ in range(2))
        state = State(past=past.sum(0).astype(np.float64))
        group: list[dict[str, Any]] = []
        for name, planner in PLANNERS.items():
            plan, seconds = timed(partial(planner, counts, home, costs, None, state))
            group.append(
                {
                    "scenario": scenario,
                    "ranks": num_ranks,
                    "experts": num_experts,
                    "planner": name,
                    "plan_us": 1e6 * seconds,
                    "imbalance": imbalance(plan.loads()),
                    "guests": len(plan.guests()),
                    "rows_crossing_fraction": plan.crossing() / int(counts.sum()),
                    "predicted_ms": 1e3 * layer_time(plan, counts, home, costs).total,
                }
            )
        best = min(record["predicted_ms"] for record in group)
        out += [{**record, "ratio_to_best": record["predicted_ms"] / best} for record in group]
    return out


def write(found: list[dict[str, Any]], folder: Path) -> None:
    """`plan.json` and `plan.png`."""
    from moetrain.bench.plan_picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(folder / "plan.png")


def timed(call: Callable[[], Plan]) -> tuple[Plan, float]:
    """(what it returns, median seconds) after a call that warms up."""
    plan = call()
    times: list[float] = []
    while len(times) < CALLS and sum(times) < SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return plan, statistics.median(times)


def show(found: list[dict[str, Any]]) -> None:
    for ranks, experts in dict.fromkeys((r["ranks"], r["experts"]) for r in found):
        table = Table("load", "planner", title=f"{ranks} ranks, {experts} experts, {ROWS:,} rows a rank")
        for column in ("µs", "max/mean", "guests", "rows crossing", "predicted ms", "× best"):
            table.add_column(column, justify="right")
        above = None
        for r in found:
            if (r["ranks"], r["experts"]) == (ranks, experts):
                if above not in (None, r["scenario"]):
                    table.add_section()
                table.add_row(
                    "" if r["scenario"] == above else r["scenario"],
                    r["planner"],
                    f"{r['plan_us']:,.0f}",
                    f"{r['imbalance']:.3f}",
                    f"{r['guests']}",
                    f"{r['rows_crossing_fraction']:.1%}",
                    f"{r['predicted_ms']:,.3f}",
                    f"{r['ratio_to_best']:.3f}",
                )
                above = r["scenario"]
        console.print(table)
    table = Table("ranks × experts", "planner", title="All loads")
    for column in ("median µs", "worst µs", "mean × best", "worst × best"):
        table.add_column(column, justify="right")
    for ranks, experts, name in dict.fromkeys((r["ranks"], r["experts"], r["planner"]) for r in found):
        own = [r for r in found if (r["ranks"], r["experts"], r["planner"]) == (ranks, experts, name)]
        times, ratios = [r["plan_us"] for r in own], [r["ratio_to_best"] for r in own]
        table.add_row(
            f"{ranks} × {experts}",
            name,
            f"{statistics.median(times):,.0f}",
            f"{max(times):,.0f}",
            f"{statistics.mean(ratios):.3f}",
            f"{max(ratios):.3f}",
        )
    console.print(table)

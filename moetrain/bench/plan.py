"""`moetrain bench plan`: how long each planner takes, and how good its plans are on the reference machine.

R ranks, E experts. All loads are drawn with a fixed seed; EPLB sees another sample of the same distribution as past.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.bench.tables import Records, Results, Tabulated
from moetrain.moe.planning import PLANNERS, default_home
from moetrain.moe.planning.cost import State, default_costs, layer_time
from moetrain.moe.planning.plan import Floats, Plan, imbalance

SIZES = ((4, 16), (8, 128), (64, 512))  # R, E
ROWS = 32768 * 4  # per rank: the LLEP paper's tokens and top-k
TINY_ROWS = 8
COLUMNS = ("load", "planner", "µs", "max/mean", "guests", "rows crossing", "predicted ms", "× best")
LEGEND = "× best: predicted time over that of the best planner for the same load."
DRAWN_SIZE = (8, 128)  # R, E
DRAWN_LOADS = ("80 % into 1", "50 % into 4", "zipf", "domain skew")
COLORS = {"kept": "tab:green", "came": "tab:orange"}
CALLS, SECONDS = 15, 0.2  # timed calls of a planner: so many, or as many as fit into that time


def draw_shares(num_ranks: int, num_experts: int, seed: int = 0) -> dict[str, Floats]:
    """Return, by scenario, [R, E]: how the rows of a source rank spread over experts; each row sums to one."""
    rng = np.random.default_rng(seed)
    even = np.full((num_ranks, num_experts), 1 / num_experts)
    ranks, per_rank = np.arange(num_ranks), num_experts // num_ranks

    def heat(share: float, experts: Any) -> Floats:
        """Send `share` of every source's rows evenly into `experts`, given for all sources or one for each."""
        into = np.zeros_like(even)
        into[ranks[:, None], experts] = 1
        return (1 - share) * even + share * into / into.sum(1, keepdims=True)

    found = {"balanced": even}
    for percent in (30, 50, 80, 95):
        for num_hot in sorted({1, 4, num_experts // 4}):
            found[f"{percent} % into {num_hot}"] = heat(percent / 100, np.arange(num_hot))
    zipf = rng.permutation(1 / np.arange(1, num_experts + 1) ** 1.1)
    favourites = np.stack([rng.permutation(num_experts)[:4] for _ in ranks])
    return {
        **found,
        "zipf": np.tile(zipf / zipf.sum(), (num_ranks, 1)),
        "domain skew": heat(0.7, favourites),  # every source has four favourites
        "dirichlet": rng.dirichlet(np.full(num_experts, 0.3), num_ranks),
        "one hot expert a rank": heat(0.8, np.arange(0, num_experts, per_rank)),  # lopsided experts, balanced ranks
        "each source: an expert next door": heat(0.8, ((ranks[:, None] + 1) % num_ranks) * per_rank),
        "hot experts share a home": heat(0.8, np.arange(per_rank)),
        "tiny batch": heat(0.5, np.arange(4)),
    }


def measure_planners() -> Records:
    """Return one record for each size, scenario and planner."""
    return [record for size in SIZES for record in measure_size(*size)]


def measure_size(num_ranks: int, num_experts: int) -> Records:
    """Return one record for each scenario and planner of one size of cluster and layer."""
    home, costs = default_home(num_experts, num_ranks), default_costs()
    rng = np.random.default_rng(1)
    out: Records = []
    for scenario, share in draw_shares(num_ranks, num_experts).items():
        rows = TINY_ROWS if scenario == "tiny batch" else ROWS
        past, counts = (np.stack([rng.multinomial(rows, p) for p in share]) for _ in range(2))
        state = State(past=past.sum(0).astype(np.float64))
        group: Records = []
        for name, planner in PLANNERS.items():
            plan, seconds = time_planner(partial(planner, counts, home, costs, None, state))
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


def time_planner(plan_once: Callable[[], Plan]) -> tuple[Plan, float]:
    """Return the plan and the median seconds of `plan_once`, after a call that warms up."""
    plan = plan_once()
    times: list[float] = []
    while len(times) < CALLS and sum(times) < SECONDS:
        start = time.perf_counter()
        plan_once()
        times.append(time.perf_counter() - start)
    return plan, statistics.median(times)


def tabulate(found: Records) -> Results:
    """Return a table for each size, and one over all loads."""
    tables = []
    for ranks, experts in dict.fromkeys((r["ranks"], r["experts"]) for r in found):
        rows = [_row(r) for r in found if (r["ranks"], r["experts"]) == (ranks, experts)]
        title = f"{ranks} ranks, {experts} experts, {ROWS:,} rows a rank"
        tables.append(Tabulated(title, COLUMNS, rows, num_left=2))
    return Results("plan", "Planners", found, [*tables, _summarize(found)], [LEGEND])


def _row(r: dict[str, Any]) -> list[str]:
    return [
        r["scenario"],
        r["planner"],
        f"{r['plan_us']:,.0f}",
        f"{r['imbalance']:.3f}",
        f"{r['guests']}",
        f"{r['rows_crossing_fraction']:.1%}",
        f"{r['predicted_ms']:,.3f}",
        f"{r['ratio_to_best']:.3f}",
    ]


def _summarize(found: Records) -> Tabulated:
    """Return a table of each planner over all loads of a size."""
    rows = []
    for ranks, experts, name in dict.fromkeys((r["ranks"], r["experts"], r["planner"]) for r in found):
        own = [r for r in found if (r["ranks"], r["experts"], r["planner"]) == (ranks, experts, name)]
        times, ratios = [r["plan_us"] for r in own], [r["ratio_to_best"] for r in own]
        numbers = (f"{statistics.median(times):,.0f}", f"{max(times):,.0f}")
        rows.append([f"{ranks} × {experts}", name, *numbers, f"{statistics.mean(ratios):.3f}", f"{max(ratios):.3f}"])
    columns = ("ranks × experts", "planner", "median µs", "worst µs", "mean × best", "worst × best")
    return Tabulated("All loads", columns, rows, num_left=2)


def draw_plans(path: Path) -> Path:
    """Draw every rank's rows under home, llep and makespan, those that were there and those that came, with the time
    that each plan is predicted to take; write the picture to `path` and return it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    num_ranks, num_experts = DRAWN_SIZE
    home, costs, drawn = default_home(num_experts, num_ranks), default_costs(), draw_shares(*DRAWN_SIZE)
    names = ("home", "llep", "makespan")
    figure, axes = plt.subplots(len(DRAWN_LOADS), len(names), figsize=(11, 9), sharex=True)
    for row, scenario in enumerate(DRAWN_LOADS):
        rng = np.random.default_rng(1)
        counts = np.stack([rng.multinomial(ROWS, p) for p in drawn[scenario]])
        for axis, name in zip(axes[row], names, strict=True):
            plan = PLANNERS[name](counts, home, costs)
            kept, seconds = plan.traffic.diagonal(), layer_time(plan, counts, home, costs)
            axis.bar(range(num_ranks), kept / 1e3, color=COLORS["kept"], label="rows computed where they were")
            came = (plan.loads() - kept) / 1e3
            axis.bar(range(num_ranks), came, bottom=kept / 1e3, color=COLORS["came"], label="rows that came")
            axis.axhline(counts.sum() / num_ranks / 1e3, color="gray", lw=0.8, ls=":")
            axis.set_title(
                f"{name}: {1e3 * seconds.total:.0f} ms, {len(plan.guests())} guests, "
                f"{plan.crossing() / counts.sum():.0%} of rows cross",
                fontsize=9,
            )
        axes[row][0].set_ylabel(f"{scenario}\nthousand rows")
    for axis in axes[-1]:
        axis.set_xlabel("rank")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle("Rows computed on each of 8 ranks, 128 experts; predicted for 8 H100 and the gpt-oss-120b layer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

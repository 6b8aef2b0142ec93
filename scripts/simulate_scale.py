"""Predicted steps against ranks, for four planners at three imbalances: where moving load stops paying.

  python scripts/simulate_scale.py --out docs/images/simulate-scale.png

DeepSeek-V3 on H100, expert groups of 64 (8 at 8 ranks, ...), one sequence of 4,096 tokens a rank, full recompute. All
of it is predicted; nothing here was measured.
"""

import argparse
import json
import sys
from pathlib import Path

from moetrain.simulate.cluster import load_cluster
from moetrain.simulate.layer import PlannerChoice
from moetrain.simulate.layout import Layout, StepWork
from moetrain.simulate.shape import from_hf
from moetrain.simulate.stack import STACKS
from moetrain.simulate.step import Job, predict_step
from moetrain.simulate.traffic import Natural, find_routing

RANKS = [8, 16, 32, 64, 256, 1024, 4096, 16384]
PLANNERS = ("home", "llep", "makespan", "eplb")
CONCENTRATIONS = {"even": 20.0, "natural": 1.25, "lopsided": 0.3}
GROUP = 64  # ranks that share a set of experts, at most


def job(ranks: int) -> Job:
    ep = min(ranks, GROUP)
    layout = Layout(ranks, ep, dp_replicate=max(1, ranks // 256))
    work = StepWork(4096, 1, ranks, "bf16", "full")
    return Job(load_cluster("h100"), from_hf("deepseek-v3"), layout, work, STACKS["moetrain"])


def predict() -> list[dict]:
    """One record for each number of ranks, imbalance and planner."""
    found = []
    for ranks in RANKS:
        for name, concentration in CONCENTRATIONS.items():
            routing = find_routing("natural", job(ranks).group, Natural(concentration))
            base = predict_step(job(ranks)).total
            for planner in PLANNERS:
                time = predict_step(job(ranks), routing, PlannerChoice(planner), samples=6)
                record = {"ranks": ranks, "routing": name, "planner": planner, "seconds": float(time.total)}
                found.append({**record, "percent_of_balanced": float(100 * base / time.total)})
    return found


def draw(found: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(CONCENTRATIONS), figsize=(12, 3.8), sharey=True)
    for axis, name in zip(axes, CONCENTRATIONS, strict=True):
        for planner in PLANNERS:
            own = [r for r in found if (r["routing"], r["planner"]) == (name, planner)]
            axis.plot(
                [r["ranks"] for r in own], [r["percent_of_balanced"] for r in own], marker="o", ms=3, label=planner
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [f"{n:,}" for n in RANKS], rotation=60, fontsize=8)
        axis.set_title(f"{name} (concentration {CONCENTRATIONS[name]:g})", fontsize=10)
        axis.set_xlabel("ranks")
        axis.axhline(100, color="gray", lw=0.8, ls=":")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("predicted, % of balanced throughput")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle("DeepSeek-V3 on H100, expert groups of at most 64 ranks: predicted, not measured", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/simulate-scale.png"))
    options = parser.parse_args()
    found = predict()
    draw(found, options.out)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

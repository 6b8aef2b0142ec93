"""`plan.png`: what each planner makes of a few loads, rank by rank, and what it is predicted to cost."""

from pathlib import Path

import numpy as np

from moetrain.bench.plan import ROWS, shares
from moetrain.moe.planning import PLANNERS, default_home
from moetrain.moe.planning.cost import default_costs, layer_time

SIZE = (8, 128)  # R, E
SCENARIOS = ("80 % into 1", "50 % into 4", "zipf", "domain skew")
COLOURS = {"kept": "tab:green", "came": "tab:orange"}


def draw(path: Path) -> Path:
    """Bars of every rank's rows under home, llep and makespan: those that were there, and those that came."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    num_ranks, num_experts = SIZE
    home, costs, drawn = default_home(num_experts, num_ranks), default_costs(), shares(*SIZE)
    names = ("home", "llep", "makespan")
    figure, axes = plt.subplots(len(SCENARIOS), len(names), figsize=(11, 9), sharex=True)
    for row, scenario in enumerate(SCENARIOS):
        rng = np.random.default_rng(1)
        counts = np.stack([rng.multinomial(ROWS, p) for p in drawn[scenario]])
        for axis, name in zip(axes[row], names, strict=True):
            plan = PLANNERS[name](counts, home, costs)
            kept, seconds = plan.traffic.diagonal(), layer_time(plan, counts, home, costs)
            axis.bar(range(num_ranks), kept / 1e3, color=COLOURS["kept"], label="rows computed where they were")
            came = (plan.loads() - kept) / 1e3
            axis.bar(range(num_ranks), came, bottom=kept / 1e3, color=COLOURS["came"], label="rows that came")
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

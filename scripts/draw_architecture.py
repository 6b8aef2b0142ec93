"""Draw docs/images/architecture.svg: the layers of the package, and the way of a micro-step through them.

  python scripts/draw_architecture.py

The packages are those of LAYERS in scripts/structure.py, so the picture is drawn anew when they change.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from structure import LAYERS

ROOT = Path(__file__).parents[1]
BANDS = (  # from the bottom to the top; what a band is called, its color, the packages in it
    ("foundation", "#d9e2ec", ("common", "launch", "distributed")),
    ("the MoE layer", "#cfe8d5", ("moe",)),
    ("what a run is", "#fdebc8", ("config", "simulate", "runs")),
    ("model, states, data", "#d6e4f7", ("models", "hf", "engine", "checkpoint", "data")),
    ("around the loop", "#eadcf4", ("observe", "recovery", "evals")),
    ("the loop", "#f9d5d3", ("training", "verify")),
    ("tools", "#e8e8e8", ("report", "bench", "doctor")),
    ("command line", "#ffffff", ("cli",)),
)
COLORS = {package: color for _, color, packages in BANDS for package in packages}
FLOW = (  # what happens, in which package, at which place of the right half
    ("documents → batch of tokens", "data", (0.5, 9.0)),
    ("embedding, attention", "models", (0.5, 7.9)),
    ("router selects experts\nmoe/routing", "moe", (0.5, 6.7)),
    ("counts of all ranks\none small all-gather", "distributed", (0.5, 5.5)),
    ("planner: counts and costs → plan\nmoe/planning", "moe", (0.5, 4.3)),
    ("dispatch rows\nmoe/exchange", "moe", (0.22, 3.1)),
    ("lend experts to guests\nmoe/exchange", "moe", (0.78, 3.1)),
    ("grouped GEMM over own experts and guests\nmoe/kernels", "moe", (0.5, 1.9)),
    ("combine: results back, weighted sum\nmoe/exchange", "moe", (0.5, 0.8)),
    ("loss + balance loss → backward → step", "training", (0.5, -0.3)),
)
ARROWS = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (4, 6), (5, 7), (6, 7), (7, 8), (8, 9))


def draw_layers(axes: Axes) -> None:
    """The packages, each on top of those that it may import."""
    assert tuple(name for _, _, packages in BANDS for name in packages) == tuple(x for x in LAYERS if x != "__main__")
    for row, (title, color, packages) in enumerate(BANDS):
        axes.text(-0.02, row + 0.4, title, ha="right", va="center", fontsize=9, color="#555555")
        for place, name in enumerate(packages):
            width = 1 / len(packages)
            box = plt.Rectangle((place * width + 0.005, row), width - 0.01, 0.8, facecolor=color, edgecolor="#666666")
            axes.add_patch(box)
            text = "moe: planning, routing, exchange, kernels" if name == "moe" else name
            axes.text((place + 0.5) * width, row + 0.4, text, ha="center", va="center", fontsize=10)
    axes.annotate("", (1.06, 0), (1.06, 7.8), arrowprops={"arrowstyle": "->", "color": "#666666"})
    axes.text(1.09, 3.9, "may import", rotation=270, va="center", fontsize=9, color="#555555")
    axes.set(xlim=(-0.42, 1.16), ylim=(-0.1, 8.4), title="Layers")


def draw_flow(axes: Axes) -> None:
    """A micro-step from text to the optimizer; the color is that of the package."""
    for text, package, (x, y) in FLOW:
        style = {"boxstyle": "round,pad=0.45", "facecolor": COLORS[package], "edgecolor": "#666666"}
        axes.text(x, y, text, ha="center", va="center", fontsize=10, bbox=style)
    for begin, end in ARROWS:
        (from_x, from_y), (to_x, to_y) = FLOW[begin][2], FLOW[end][2]
        down = 0.42  # half the height of a box of two lines
        arrow = {"arrowstyle": "->", "color": "#666666", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (to_x, to_y + down), (from_x, from_y - down), arrowprops=arrow)
    axes.annotate(
        "for every\nlayer",
        (0.72, 7.9),
        (1.08, 5.0),
        fontsize=9,
        color="#555555",
        ha="center",
        arrowprops={"arrowstyle": "->", "color": "#999999", "connectionstyle": "arc3,rad=0.3"},
    )
    axes.set(xlim=(-0.1, 1.15), ylim=(-0.7, 9.4), title="A micro-step")


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "moetrain", "font.family": "sans-serif"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6.4), width_ratios=(1.15, 1))
    draw_layers(left)
    draw_flow(right)
    for axes in (left, right):
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "architecture.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()

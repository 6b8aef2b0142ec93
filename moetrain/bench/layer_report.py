"""What `moetrain bench layer` found, on real and on virtual ranks: tables, a summary, Markdown, a picture."""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moetrain.bench.cases import BALANCED
from moetrain.bench.protocol import KERNELS
from moetrain.bench.tables import Records, Results, Tabulated

COLORS = {
    "home": "tab:red",
    "llep": "tab:orange",
    "makespan": "tab:green",
    "eplb": "tab:purple",
    "static": "tab:blue",
    "auto": "tab:cyan",
}
WORST = 3  # cells that are named
HEADING = "One MoE layer, forward and backward"
VIRTUAL_HEADING = "One MoE layer, virtual ranks"
COST = "speed as a share of that of the GEMMs alone · rows crossing · guests · peak memory × balanced"
LEGEND = (
    "ms forward and backward · speed as % of our layer under balanced routing, in pairs, ± half the quartiles' distance"
)
LINKS = "links: nodes of 8 with NVLink at 300 GB/s, 33 GB/s between nodes (cost.layer_time)"
MEASURED = ("plan", "index", "forward", "backward")  # index is part of forward
MODELLED = ("dispatch", "lend", "combine")


def publish(records: Records, out: Path | None) -> None:
    """Print the tables and the summary; with a folder, write layer.json, layer.md and layer.png."""
    tables = [table for group in group_by_shape(records) for table in _tabulate(group)]
    results = Results("layer", HEADING, records, tables, [LEGEND, *summarize(records)])
    results.publish(out, partial(draw_speeds, records))


def publish_virtual(records: Records, out: Path | None) -> None:
    """Print the tables and the summary; with a folder, write layer.json, layer.md and layer.png."""
    tables = [table for group in group_by_shape(records) for table in _tabulate_virtual(group)]
    results = Results("layer", VIRTUAL_HEADING, records, tables, [LINKS, *summarize(records)])
    results.publish(out, partial(draw_speeds, records))


def group_by_shape(records: Records) -> list[Records]:
    """Return the records of each dtype and number of experts."""
    groups: dict[tuple[str, int], Records] = {}
    for record in records:
        groups.setdefault((record["dtype"], record["experts"]), []).append(record)
    return list(groups.values())


def describe_shape(group: Records) -> str:
    """Describe the layer and the machine of a group in one line."""
    r = group[0]
    chosen = r.get("kernels", KERNELS[0])
    return (
        f"{r['dtype']}, {r['experts']} experts, top-{r['top_k']}, {r['tokens']:,} tokens a rank, "
        f"{r['dim']} × {r['hidden']}, {r['ranks']} ranks on {r['device']}"
        + (f", kernels: {chosen}" if chosen != KERNELS[0] else "")
    )


def _tabulate(group: Records) -> list[Tabulated]:
    """Return a table of the speed of each routing and planner, and one of what it costs."""
    planners = list(dict.fromkeys(r["planner"] for r in group))
    speed, cost = [], []
    for scenario in dict.fromkeys(r["scenario"] for r in group):
        cells = [r for p in planners for r in group if r["scenario"] == scenario and r["planner"] == p]
        speed.append([scenario, *map(_format_speed, cells)])
        cost.append([scenario, *map(_format_cost, cells)])
    columns = ["routing", *planners]
    title = f"{describe_shape(group)}, {group[0]['repeats']} repeats"
    return [Tabulated(title, columns, speed), Tabulated(COST, columns, cost)]


def _tabulate_virtual(group: Records) -> list[Tabulated]:
    """Return a table of what was measured, and one of what was modelled with it."""
    title = (
        f"{describe_shape(group)}\nmeasured, one rank after another: ms of the slowest rank (index "
        f"is part of forward); GEMMs alone: {group[0]['gemm_ms']:,.2f} ms for a balanced rank, as % of forward and "
        "backward"
    )
    measured, modelled = [], []
    for r in group:
        cell = [r["scenario"], r["planner"]]
        shares = (f"{r['percent_of_gemm_without_links']:.1f}", f"{r['max_over_mean']:.2f}", f"{r['memory_ratio']:.2f}")
        measured.append([*cell, *_format_ms(r, MEASURED), *shares])
        total = (f"{r['total_ms']:,.2f}", f"{r['percent_of_balanced']:.1f}")
        modelled.append([*cell, *_format_ms(r, MODELLED), f"{r['rows_crossing']:,}", str(r["guests"]), *total])
    left = ("routing", "planner")
    columns = (*left, *MODELLED, "rows crossing", "guests", "predicted ms", "% of balanced")
    return [
        Tabulated(title, (*left, *MEASURED, "GEMMs alone", "max/mean", "memory × balanced"), measured, num_left=2),
        Tabulated("modelled: ms; predicted: plan + forward + backward + links", columns, modelled, num_left=2),
    ]


def _format_ms(record: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return cells of these times."""
    return [f"{record[f'{name}_ms']:,.2f}" for name in names]


def _format_speed(r: dict[str, Any]) -> str:
    return f"{r['total_ms']:,.0f} ms  {r['percent_of_balanced']:5.1f} % ±{r['spread'] / 2:.1f}"


def _format_cost(r: dict[str, Any]) -> str:
    return f"{r['percent_of_gemm']:.1f} % · {r['rows_crossing']:,} · {r['guests']} · {r['memory_ratio']:.2f}"


def summarize(records: Records) -> list[str]:
    """Describe, for each dtype, the balanced layer beside its GEMMs, and each planner over the whole grid."""
    lines = []
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        own = [r for r in records if r["dtype"] == dtype]
        for r in own:
            if r["scenario"] == BALANCED and r["planner"] == "home" and "gemm_spread" in r:
                share = f"{r['percent_of_gemm']:.1f} % of the speed of the GEMMs alone (±{r['gemm_spread'] / 2:.1f})"
                lines.append(f"{dtype}, {r['experts']} experts, balanced: {share}")
        for planner in dict.fromkeys(r["planner"] for r in own):
            cells = sorted((r for r in own if r["planner"] == planner), key=lambda r: r["percent_of_balanced"])
            mean = statistics.mean(r["percent_of_balanced"] for r in cells)
            memory = max(cells, key=lambda r: r["memory_ratio"])
            worst = ", ".join(f"{r['percent_of_balanced']:.1f} % ({_name_cell(r)})" for r in cells[:WORST])
            lines.append(
                f"{dtype} {planner}: mean {mean:.1f} % of balanced over {len(cells)} cells; worst {worst}; "
                f"memory at most {memory['memory_ratio']:.2f} × ({_name_cell(memory)})"
            )
    return lines


def _name_cell(r: dict[str, Any]) -> str:
    return f"{r['scenario']}, {r['experts']} experts"


def draw_speeds(records: Records, path: Path) -> None:
    """Draw a panel for each dtype: speed as a share of balanced, by routing, a bar for each planner."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(r["dtype"] for r in records))
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(13, 4.2 * len(dtypes)), squeeze=False)
    for dtype, axis in zip(dtypes, axes[:, 0], strict=True):
        own = [r for r in records if r["dtype"] == dtype]
        planners = list(dict.fromkeys(r["planner"] for r in own))
        cells = list(dict.fromkeys((r["experts"], r["scenario"]) for r in own))
        width = 0.8 / len(planners)
        for number, planner in enumerate(planners):
            found = {(r["experts"], r["scenario"]): r for r in own if r["planner"] == planner}
            place = [at + (number - (len(planners) - 1) / 2) * width for at in range(len(cells))]
            axis.bar(
                place,
                [found[c]["percent_of_balanced"] for c in cells],
                width,
                yerr=[found[c].get("spread", 0) / 2 for c in cells],
                error_kw={"lw": 0.8},
                label=planner,
                color=COLORS.get(planner),
            )
        axis.axhline(100, color="black", lw=0.8)
        axis.set_xticks(range(len(cells)), [f"{s}\n{e} experts" for e, s in cells], rotation=60, ha="right", fontsize=8)
        axis.set(ylabel="% of balanced speed")
        axis.set_title(f"{dtype}: {_describe_balanced(own)}", pad=24)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, ncols=len(planners), loc="lower left", bbox_to_anchor=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _describe_balanced(records: Records) -> str:
    """Describe the layer, and its speed under balanced routing beside that of its GEMMs."""
    found = [r for r in records if r["scenario"] == BALANCED and r["planner"] == "home" and "percent_of_gemm" in r]
    shares = ", ".join(f"{r['percent_of_gemm']:.0f} % ({r['experts']} experts)" for r in found)
    r = records[0]
    place = f"{r['tokens']:,} tokens a rank, {r['dim']} × {r['hidden']}, top-{r['top_k']}, {r['ranks']} ranks"
    return f"{place}; balanced runs at {shares} of its GEMMs" if shares else place

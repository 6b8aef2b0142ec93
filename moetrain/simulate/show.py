"""Predictions on the terminal, and one picture of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moetrain.common.console import console
from moetrain.simulate.predict import Prediction
from moetrain.simulate.step import PARTS, Job
from moetrain.simulate.sweep import Candidate

GIB = 2**30
EXPLAINED = (
    "A prediction, not a measurement; docs/simulate.md says how far such predictions were off. Parts are of the "
    "slowest rank; what hides behind computation is left out. Interval: 10th to 90th percentile over routings of "
    "that kind."
)


def print_predictions(found: Sequence[Prediction]) -> None:
    """One column a planner: time and its parts, throughput, memory and its parts, bytes on the links."""
    first = found[0]
    console.print(describe(first.job) + f"; routing {first.routing}")
    table = Table("", *(p.planner for p in found), box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("step", *(_seconds(p.time.total) for p in found), style="bold")
    if any(p.time.high > p.time.low for p in found):
        table.add_row("  interval", *(f"{_seconds(p.time.low)} to {_seconds(p.time.high)}" for p in found))
        table.add_row("  error of drawing layers", *(f"± {_seconds(p.time.error)}" for p in found))
    for part in PARTS:
        if any(p.time.parts[part] > 0 for p in found):
            table.add_row(f"  {part}", *(_part(p, part) for p in found))
    table.add_row("tokens/s a device", *(f"{p.tokens_per_second_per_device:,.0f}" for p in found), style="bold")
    table.add_row("MFU", *(f"{100 * p.mfu:.1f} %" for p in found))
    table.add_row("% of balanced", *(f"{p.percent_of_balanced:.1f}" for p in found))
    table.add_row("max/mean load, planned", *(f"{p.imbalance:.2f}" for p in found))
    table.add_row("experts lent in a layer", *(f"{p.guests:.1f}" for p in found))
    capacity = first.job.cluster.memory.capacity / GIB
    verdicts = (f"{p.memory.on_device / GIB:.1f} GiB{'' if p.fits else ', TOO MUCH'}" for p in found)
    table.add_row(f"memory, of {capacity:.0f} GiB", *verdicts, style="bold")
    for part in dict.fromkeys(part for p in found for part in p.memory.parts):
        table.add_row(f"  {part}", *(f"{p.memory.parts.get(part, 0.0) / GIB:.2f}" for p in found))
    table.add_row("sent by a rank in a step", style="bold")
    for name in first.time.link_bytes:
        table.add_row(f"  {name}", *(f"{p.time.link_bytes[name] / GIB:.2f} GiB" for p in found))
    console.print(table)
    console.print(EXPLAINED, style="dim")


def describe(job: Job) -> str:
    """The job in a line."""
    layout, work = job.layout, job.work
    axes = {"r": layout.r, "pp": layout.pp, "tp": layout.tp, "cp": layout.cp, "dp_replicate": layout.dp_replicate}
    others = "".join(f", {name} {value}" for name, value in axes.items() if value > 1)
    return (
        f"{job.shape.name}, {job.shape.params / 1e9:.3g}B parameters, {job.shape.active_params / 1e9:.3g}B active, on "
        f"{layout.world} × {job.cluster.device} with {job.stack.name}: ep {layout.ep}{others}, "
        f"{work.global_batch} sequences of {work.seq_len:,} in {work.micro_steps(layout)} micro-step(s), {work.dtype}, "
        f"recompute {work.recompute}"
    )


def print_sweep(found: Sequence[Candidate], left_out: dict[str, int], job: Job) -> None:
    """The best layouts, and how many were left out for what."""
    console.print(describe(job).partition(": ")[0])
    columns = (
        "ep",
        "replicas",
        "pp",
        "tp",
        "micro-batch",
        "recompute",
        "reshard",
        "step",
        "tokens/s a device",
        "MFU",
        "GiB",
    )
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    table.add_column("besides computing, most of it", no_wrap=True)
    for candidate in found:
        p = candidate.prediction
        layout, work = p.job.layout, p.job.work
        ep = f"{layout.ep}, r {layout.r}" if layout.r > 1 else layout.ep
        numbers = (ep, layout.dp_replicate, layout.pp, layout.tp, work.micro_batch)
        table.add_row(
            *(str(n) for n in numbers),
            work.recompute,
            "yes" if layout.reshard else "no",
            _seconds(p.time.total),
            f"{p.tokens_per_second_per_device:,.0f}",
            f"{100 * p.mfu:.1f} %",
            f"{p.memory.on_device / GIB:.1f}",
            candidate.reason,
        )
    console.print(table)
    if not found:
        console.print("no layout fits into the devices' memory")
    for reason, number in sorted(left_out.items(), key=lambda item: -item[1]):
        console.print(f"left out: {number} × {reason}")


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _part(p: Prediction, part: str) -> str:
    return f"{_seconds(p.time.parts[part])} {100 * p.time.parts[part] / p.time.total:5.1f} %"


def write(found: Sequence[Prediction], folder: Path) -> None:
    """`simulate.json` and `simulate.png` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "simulate.json").write_text(json.dumps([p.record() for p in found], indent=1) + "\n")
    if found:
        draw(found, folder / "simulate.png")
        console.print(f"written: {folder}/simulate.json, simulate.png")


def draw(found: Sequence[Prediction], path: Path) -> None:
    """A bar of time and a bar of memory for each prediction, in their parts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.5 * len(found)))
    is_sweep = len({p.planner for p in found}) < len(found)
    names = [f"ep {p.job.layout.ep}, {p.job.work.recompute}" if is_sweep else p.planner for p in found]
    places = [str(number) for number in range(len(found))][::-1]
    for axis, values, unit in (
        (left, [{k: 1e3 * v for k, v in p.time.parts.items()} for p in found], "milliseconds of a step"),
        (right, [{k: v / GIB for k, v in p.memory.parts.items()} for p in found], "GiB of the fullest rank"),
    ):
        labels = [key for key in dict.fromkeys(k for value in values for k in value) if any(v.get(key) for v in values)]
        base = [0.0] * len(found)
        colours = plt.get_cmap("tab20").colors
        for number, label in enumerate(labels):
            widths = [value.get(label, 0.0) for value in values]
            axis.barh(places, widths, left=base, label=label, color=colours[number % 20])
            base = [b + w for b, w in zip(base, widths, strict=True)]
        axis.set_xlabel(unit)
        axis.legend(frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.28))
        axis.set_yticks(places, names)
        axis.spines[["top", "right"]].set_visible(False)
    balanced = 1e3 * found[0].balanced
    left.axvline(balanced, color="gray", lw=0.8, ls=":")
    left.annotate("balanced", (balanced, 1), xycoords=("data", "axes fraction"), fontsize=8, color="gray", ha="center")
    right.axvline(found[0].job.cluster.memory.capacity / GIB, color="tab:red", lw=0.8, ls=":")
    first = found[0].job
    figure.suptitle(f"{first.shape.name} on {first.layout.world} × {first.cluster.device}, predicted", fontsize=10)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)

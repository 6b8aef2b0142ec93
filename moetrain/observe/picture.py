"""A run in one picture: loss per domain, imbalance over time, the devices' load before and after planning.

The colors here are those of every picture: of the page (report/page/style.css has the same), of PNGs and of run.png.
Those of lines stay apart under each of the three kinds of color blindness: Okabe and Ito's without yellow and black.
Where they are used up, lines differ by their dashes.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.common import disk
from moetrain.observe.collect import trace
from moetrain.observe.metrics import DOMAIN_LOSS, IMBALANCE_HOME, IMBALANCE_PLANNED, LM_LOSS, METRICS, for_domain
from moetrain.observe.reduce import smooth

SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
DASHES = ("", "7 3", "2 2.5", "9 3 2 3")  # lengths of strokes and gaps, as in SVG
ORDERED = ("#43257a", "#2f62a8", "#1b8a8a", "#5da53a", "#c9a200")  # layers and ranks, from the first to the last
TONES = {"main": "#28354d", "home": "#c65a35", "planned": "#177a68"}
HEAT = ("#2a4b8d", "#93b4de", "#f3f2ee", "#f0a67c", "#ad2f1b")


def line_style(index: int) -> dict[str, object]:
    """Return color and dashes of the line number `index`, as arguments of matplotlib's `plot`."""
    dashes = [float(length) for length in DASHES[index // len(SERIES) % len(DASHES)].split()]
    return {"color": SERIES[index % len(SERIES)], "linestyle": (0, tuple(dashes)) if dashes else "-"}


def draw(folder: Path) -> Path:
    """Write `run.png` into a run's folder, from its metrics and load trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in disk.rows(folder / "metrics.jsonl") if LM_LOSS in row]
    steps = [row["step"] for row in rows]
    figure, (loss, balance, device) = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=[5, 4, 3])

    form = METRICS[DOMAIN_LOSS].form
    domains = sorted({m["domain"] for row in rows for key in row if (m := form.fullmatch(key))})
    for number, name in enumerate(domains):
        _curve(loss, steps, _values(rows, for_domain(DOMAIN_LOSS, name)), label=name, lw=1.5, **line_style(number))
    _curve(loss, steps, _values(rows, LM_LOSS), label="all", color=TONES["main"], lw=2)
    loss.set(title="Training loss per domain (nats/token; smoothed, thin: steps)", xlabel="step")
    loss.legend(frameon=False)

    for metric, label, tone in ((IMBALANCE_HOME, "at home", "home"), (IMBALANCE_PLANNED, "planned", "planned")):
        balance.plot(steps, _values(rows, metric), label=label, color=TONES[tone], lw=1.2)
    balance.axhline(1, color="gray", lw=0.8, ls=":")
    balance.set(title="Device imbalance (busiest / mean load)", xlabel="step")
    balance.legend(frameon=False)

    if (worst := _worst_sample(folder)) is not None:
        step, layer, home, planned = worst
        place = np.arange(len(home))
        device.bar(place - 0.2, home, 0.4, label="at home", color=TONES["home"])
        device.bar(place + 0.2, planned, 0.4, label="planned", color=TONES["planned"])
        device.axhline(1, color="gray", lw=0.8, ls=":")
        device.set(title=f"Largest imbalance: layer {layer}, step {step}", xlabel="device", ylabel="load / mean load")
        device.set_ylim(0, 1.25 * max(home))
        device.set_xticks(place)
        device.legend(frameon=False, loc="upper right", ncols=2)
    for axis in (loss, balance, device):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = folder / "run.png"
    with disk.replacing(path) as out:
        figure.savefig(out, dpi=110, format="png")
    plt.close(figure)
    return path


def _worst_sample(folder: Path) -> tuple[int, int, np.ndarray, np.ndarray] | None:
    """(step, layer, [R] load at home, [R] planned), in mean loads, of the most lopsided sample of the load trace."""
    found = trace.read(folder)
    if not len(found["step"]):
        return None
    share, after = (found[x] / found[x].mean(-1, keepdims=True).clip(min=1e-9) for x in ("home", "planned"))
    sample, layer = np.unravel_index(share.max(-1).argmax(), share.shape[:2])
    return int(found["step"][sample]), int(layer), share[sample, layer], after[sample, layer]


def _values(rows: list[dict[str, Any]], name: str) -> list[float]:
    """NaN where a row has no finite number of that name."""
    found = (row.get(name) for row in rows)
    return [float(x) if isinstance(x, int | float) and math.isfinite(x) else math.nan for x in found]


def _curve(axis: Any, steps: list[int], values: list[float], **style: Any) -> None:
    """A smoothed line over what single steps reached."""
    (line,) = axis.plot(steps, smooth(np.array(values)), **style)
    axis.plot(steps, values, color=line.get_color(), lw=0.5, alpha=0.35)

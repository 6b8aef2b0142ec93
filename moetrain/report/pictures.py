"""The main figures of a run as PNGs, for slides and papers: drawn from the same data as the page."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.observe.picture import HEAT, ORDERED, SERIES, TONES, line_style
from moetrain.report.curves import Figure

PICTURES = ("loss", "load", "devices", "imbalance", "time", "moved", "domains", "information")
AREAS = {  # what the MoE layers do; everything else is grey, as on the page
    "route": SERIES[3], "plan": SERIES[5], "lend": SERIES[1], "dispatch": SERIES[0], "experts": TONES["planned"],
    "combine": SERIES[4],
}  # fmt: skip
GREYS = {"other forward": "0.6", "other backward": "0.68", "optimizer": "0.76", "data": "0.84", "the rest": "0.9"}
TITLES = {
    "loss": "Training loss per domain (smoothed, thin: steps)",
    "load": "Expert load at the last step (mean loads)",
    "devices": "Device load (mean loads)",
    "imbalance": "Device imbalance (busiest / mean)",
    "time": "Where a step goes",
    "moved": "Rows moved and rows sent to another rank",
    "domains": "Expert × domain, last layer (times as often as all text)",
    "information": "Mutual information of domain and expert",
}


def draw(run: dict[str, Any], folder: Path, several: bool = False) -> list[Path]:
    """Write `NAME.png` of every figure that was recorded, below the run's name where there are several."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder = folder / run["name"].replace("/", "-") if several else folder
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in PICTURES:
        figure = run["figures"][name]
        if figure["kind"] not in DRAW:
            continue
        canvas, axis = plt.subplots(figsize=(7.2, 4.0))
        axis.set_title(TITLES[name], loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        DRAW[figure["kind"]](axis, figure)
        canvas.tight_layout()
        paths.append(folder / f"{name}.png")
        canvas.savefig(paths[-1], dpi=140)
        plt.close(canvas)
    return paths


def _lines(axis: Any, figure: Figure) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    series, layers = figure["series"], LinearSegmentedColormap.from_list("layers", ORDERED)
    for index, line in enumerate(series):
        number = line.get("color")
        style: dict[str, Any] = line_style(index if number is None else number)
        if figure.get("ordered"):
            style = {"color": layers(index / max(1, len(series) - 1))}
        if tone := TONES.get(line.get("tone", "")):
            style = {"color": tone}
        label = f"{figure['prefix']} {line['name']}" if figure.get("prefix") else line["name"]
        values, x = np.array(line["y"], dtype=float), line.get("x", figure["x"])
        if "raw" in line and not figure.get("ordered"):
            axis.plot(x, np.array(line["raw"], dtype=float), color=style["color"], lw=0.6, alpha=0.35)
        axis.plot(
            x,
            values,
            **style,
            label=label,
            lw=1.5,
            marker="o" if len(values) < 10 else None,
        )
    if "reference" in figure:
        axis.axhline(figure["reference"], color="gray", lw=0.8, ls=":")
    if "floor" in figure:
        axis.set_ylim(bottom=figure["floor"])
    axis.set(xlabel="step", ylabel=figure.get("unit"))
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=8, ncols=1 + len(series) // 10)


def _area(axis: Any, figure: Figure) -> None:
    values = np.nan_to_num(np.array([line["y"] for line in figure["series"]], dtype=float))
    names = [line["name"] for line in figure["series"]]
    axis.stackplot(figure["x"], values, labels=names, colors=[AREAS.get(n) or GREYS.get(n, "0.5") for n in names], lw=0)
    axis.set_ylim(0, 1.2 * np.quantile(values.sum(0), 0.98))
    axis.set_xlabel("step")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _bars(axis: Any, figure: Figure) -> None:
    names, values = zip(*((row["name"], row["value"]) for row in figure["rows"]), strict=True)
    axis.barh(names, values, color=TONES["main"])
    axis.invert_yaxis()


def _load(axis: Any, figure: Figure) -> None:
    shape = (len(figure["steps"]), len(figure["layers"]), max(figure["experts"]))
    code = np.frombuffer(base64.b64decode(figure["cells"]), np.uint8).reshape(shape)[-1]
    _heat(axis, code, [name.removeprefix("layer_") for name in figure["layers"]])
    axis.set(xlabel="expert", ylabel="layer")


def _domains(axis: Any, figure: Figure) -> None:
    shape = (len(figure["layers"]), len(figure["domains"]), max(figure["experts"]))
    _heat(axis, np.frombuffer(base64.b64decode(figure["cells"]), np.uint8).reshape(shape)[-1], figure["domains"])
    axis.set_xlabel("expert")


def _heat(axis: Any, code: np.ndarray, rows: list[str]) -> None:
    """Codes of `reduce.pack_load`: an eighth to eight times the mean; × where there is nothing."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("load", HEAT)
    doublings = np.ma.masked_where(code == 255, np.where(code == 0, -3, (code.astype(float) - 127) / 16))
    image = axis.imshow(doublings, cmap=scale, vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    row, column = np.nonzero(code == 0)
    axis.plot(column, row, "x", color="#28354d", ms=4, ls="")
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    bar = axis.figure.colorbar(image, ax=axis, ticks=[-3, -1, 0, 1, 3])
    bar.ax.set_yticklabels(["⅛", "½", "1", "2", "8"])


def _devices(axis: Any, figure: Figure) -> None:
    """The most lopsided sample."""
    shape = (len(figure["steps"]), len(figure["layers"]), figure["ranks"])
    home, planned = (
        np.frombuffer(base64.b64decode(figure[x]), "<u2").reshape(shape) / 1000 for x in ("home", "planned")
    )
    sample, layer = np.unravel_index(home.max(-1).argmax(), shape[:2])
    place = np.arange(figure["ranks"])
    axis.bar(place - 0.2, home[sample, layer], 0.4, label="experts at home", color=TONES["home"])
    axis.bar(place + 0.2, planned[sample, layer], 0.4, label="as planned", color=TONES["planned"])
    axis.axhline(1, color="gray", lw=0.8, ls=":")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(
        f"device; {figure['layers'][layer].replace('_', ' ')}, step {figure['steps'][sample]}: the largest imbalance"
    )
    axis.legend(frameon=False, fontsize=8)


DRAW: dict[str, Callable[[Any, Figure], None]] = {
    "lines": _lines,
    "area": _area,
    "bars": _bars,
    "load": _load,
    "domains": _domains,
    "devices": _devices,
}

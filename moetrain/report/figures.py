"""The figures of one run, as data: what the page draws. `page.html` says what each is and how to read it.

A figure is a dictionary with `kind`, which names the function of `charts.js` that draws it. What was not recorded is a
figure of kind `absent` with the reason.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moetrain.observe.meter import PHASES
from moetrain.report import reduce
from moetrain.report.read import Run
from moetrain.report.reduce import plain

Figure = dict[str, Any]
LAYER = r"layer_\d+(?:_\d+)?"


def figures(run: Run) -> dict[str, Figure]:
    return {name: draw(run) for name, draw in FIGURES.items()}


def absent(reason: str) -> Figure:
    return {"kind": "absent", "text": reason}


def layers(run: Run, pattern: str) -> dict[str, str]:
    """{layer's name: metric's name} of the metrics that match `pattern`, in which LAYER stands for a layer."""
    form = re.compile(pattern.replace("LAYER", f"(?P<layer>{LAYER})"))
    found = {m["layer"]: name for name in run.metrics.names if (m := form.fullmatch(name))}
    return dict(sorted(found.items()))


class Grid:
    """The training rows in at most `MOST_POINTS` buckets."""

    def __init__(self, run: Run) -> None:
        self.rows = run.metrics.training
        self.begin = reduce.edges(len(self.rows), reduce.MOST_POINTS)
        ends = [*self.begin[1:], len(self.rows)]
        self.steps = [self.rows[end - 1]["step"] for end in ends] if self.rows else []
        self._metrics = run.metrics

    def series(self, label: str, name: str, band: bool = False, smoothing: float = 0.0, **more: Any) -> Figure | None:
        """One line; `band` keeps each bucket's extremes. None where nothing was recorded."""
        values = self._metrics.numbers(name, self.rows)
        if not np.isfinite(values).any():
            return None
        line = reduce.smooth(values, smoothing) if smoothing else values
        out = {"name": label, "y": plain(reduce.means(line, self.begin)), **more}
        if band:
            low, high = reduce.extremes(values, self.begin)
            out |= {"low": plain(low), "high": plain(high)}
        return out

    def lines(self, series: Iterable[Figure | None], missing: str, **more: Any) -> Figure:
        found = [line for line in series if line is not None]
        if not found:
            return absent(missing)
        return {"kind": "lines", "x": self.steps, "series": found, **more}


def loss(run: Run) -> Figure:
    grid = Grid(run)
    domains = sorted(
        m[1] for name in run.metrics.names if (m := re.fullmatch(r"train/([^/]+)/loss", name)) and m[1] != "all"
    )
    whole = grid.series("all", "train/lm_loss", band=True, smoothing=0.8, tone="main")
    each = [grid.series(name, f"train/{name}/loss", smoothing=0.8) for name in domains]
    return grid.lines([whole, *each], "train/lm_loss was not recorded", unit="nats a token", height=300)


def held_out(run: Run) -> Figure:
    """The last evaluation, beside the bigram model where the run has ended."""
    names = [m[1] for name in run.metrics.names if (m := re.fullmatch(r"eval/([^/]+)/bits_per_byte", name))]
    values = {name: run.metrics.last(f"eval/{name}/bits_per_byte") for name in sorted(names)}
    if not values:
        return absent("no held-out evaluation yet (eval.every; one at the end of every run)")
    bigram = run.summary.get("bigram_bits_per_byte") or {}
    values["all"] = run.metrics.last("eval/bits_per_byte")
    rows = [{"name": n, "value": v, "mark": bigram.get(n)} for n, v in values.items() if np.isfinite(v)]
    return {
        "kind": "bars",
        "rows": rows,
        "unit": "bits a byte",
        "mark": "a bigram model" if bigram else None,
        "digits": 3,
    }


def load(run: Run) -> Figure:
    """[frames, layers, experts] in mean loads, packed: every frame the mean of the rows it stands for."""
    found = {name: run.metrics.lists(metric) for name, metric in layers(run, "balance/LAYER/load").items()}
    found = {name: pair for name, pair in found.items() if len(pair[0])}
    if not found:
        return absent("balance/layer_LL/load was not recorded")
    steps = min((pair[0] for pair in found.values()), key=len)
    experts = [pair[1].shape[1] for pair in found.values()]
    most = int(np.clip(reduce.MOST_CELLS // (len(experts) * max(experts)), 24, 160))
    begin = reduce.edges(len(steps), most)
    frames = np.full((len(begin), len(experts), max(experts)), np.nan)
    for index, (_, values) in enumerate(found.values()):
        frames[:, index, : experts[index]] = reduce.means(values[: len(steps)], begin) * experts[index]
    ends = [*begin[1:], len(steps)]
    return {
        "kind": "load",
        "steps": [int(steps[end - 1]) for end in ends],
        "layers": [*found],
        "experts": experts,
        "cells": reduce.pack_load(frames),
    }


def per_layer(pattern: str, missing: str, smoothing: float = 0.7, **more: Any) -> Callable[[Run], Figure]:
    """A line a layer of the metric that `pattern` names."""

    def draw(run: Run) -> Figure:
        grid = Grid(run)
        found = layers(run, pattern)
        series = [
            grid.series(name.removeprefix("layer_"), metric, smoothing=smoothing) for name, metric in found.items()
        ]
        return grid.lines(series, missing, ordered=True, prefix="layer", **more)

    return draw


def held_out_per_layer(pattern: str, missing: str, **more: Any) -> Callable[[Run], Figure]:
    """The same of what evaluations find."""

    def draw(run: Run) -> Figure:
        found = layers(run, pattern)
        rows = [row for row in run.metrics.rows if any(metric in row for metric in found.values())]
        if not rows:
            return absent(missing)
        if len(rows) == 1:
            last = {name.replace("_", " "): run.metrics.last(metric) for name, metric in found.items()}
            bars = [{"name": name, "value": value} for name, value in last.items() if np.isfinite(value)]
            return {"kind": "bars", "rows": bars, "digits": 2}
        series = [
            {"name": name.removeprefix("layer_"), "y": plain(run.metrics.numbers(metric, rows))}
            for name, metric in found.items()
        ]
        x = [row["step"] for row in rows]
        return {"kind": "lines", "x": x, "series": series, "ordered": True, "prefix": "layer", **more}

    return draw


def lines(series: dict[str, tuple[str, str]], missing: str, **more: Any) -> Callable[[Run], Figure]:
    """{metric: (label, tone)} with each bucket's extremes as a band."""

    def draw(run: Run) -> Figure:
        grid = Grid(run)
        found = [
            grid.series(label, name, band=True, smoothing=0.7, tone=tone) for name, (label, tone) in series.items()
        ]
        return grid.lines(found, missing, **more)

    return draw


def devices(run: Run) -> Figure:
    """[frames, layers, ranks] in mean loads: at home, planned, and what of the latter guests computed.

    Layer 0 of it is the sum over all layers.
    """
    trace, names = run.trace, trace_layers(run)
    guests = None
    if {"home", "planned"} <= {*trace}:
        steps, home, planned = (trace[name] for name in ("step", "home", "planned"))
        if {"placed", "owner"} <= {*trace}:
            ranks = np.arange(home.shape[-1])[:, None]
            guests = np.where(trace["owner"][:, :, None] == ranks, 0, trace["placed"]).sum(-1)
    else:
        steps, home = (x[:, None] if x.ndim > 1 else x for x in run.metrics.lists("balance/device_load_home"))
        planned = run.metrics.lists("balance/device_load_planned")[1][:, None]
        if not len(steps) or home.shape != planned.shape:
            return absent("neither a load trace (track.trace_every) nor balance/device_load_* was recorded")
        names = []
    guests = np.zeros_like(planned) if guests is None else guests
    kept = frames(len(steps), 3 * (home[0].size + home.shape[-1]))
    whole = lambda x: np.concatenate([x.sum(1, keepdims=True), x], 1)[kept] if names else x[kept]  # noqa: E731
    home, planned, guests = (whole(x) for x in (home, planned, guests))
    mean = np.maximum(planned.mean(-1, keepdims=True), 1e-9)
    return {
        "kind": "devices",
        "steps": steps[kept].tolist(),
        "layers": ["all layers", *names],
        "ranks": int(home.shape[-1]),
        "home": reduce.pack_thousandths(home / mean),
        "planned": reduce.pack_thousandths(planned / mean),
        "guests": reduce.pack_thousandths(guests / mean),
    }


def traffic(run: Run) -> Figure:
    """[frames, layers, source, destination]: rows that travelled, in percent of the layer's rows."""
    if "traffic" not in run.trace:
        return absent("the load trace has no traffic")
    steps, rows = run.trace["step"], run.trace["traffic"]
    total = np.maximum(rows.sum((-2, -1), keepdims=True), 1)
    rows, block = coarse(rows * (1 - np.eye(rows.shape[-1], dtype=rows.dtype)))
    kept = frames(len(steps), rows[0].size)
    share = rows[kept] / total[kept]
    return {
        "kind": "matrix",
        "steps": steps[kept].tolist(),
        "layers": trace_layers(run),
        "size": rows.shape[-1],
        "block": block,
        "most": float(share.max()),
        "cells": reduce.pack_thousandths(share / max(share.max(), 1e-9)),
        "what": "of the rows went from rank {row} to rank {column}",
        "unit": "share",
    }


def waited(run: Run) -> Figure:
    """[frames, 1, who, for whom] in seconds of a step."""
    found = run.trace.get("waited")
    if found is None or not np.isfinite(found).any():
        return absent("the load trace has no waiting times")
    steps, (seconds, block) = run.trace["step"], coarse(np.nan_to_num(found))
    kept = frames(len(steps), seconds[0].size)
    most = float(max(seconds[kept].max(), 1e-9))
    return {
        "kind": "matrix",
        "steps": steps[kept].tolist(),
        "layers": [],
        "size": seconds.shape[-1],
        "block": block,
        "most": most,
        "cells": reduce.pack_thousandths(seconds[kept][:, None] / most),
        "what": "s rank {row} waited for rank {column}",
        "unit": "seconds",
    }


def trace_layers(run: Run) -> list[str]:
    """Names of the trace's layers; older traces have none."""
    if "layers" in run.trace:
        return run.trace["layers"].tolist()
    count = run.trace["home"].shape[1] if "home" in run.trace else 0
    names = [*layers(run, "balance/LAYER/load")]
    return names if len(names) == count else [f"layer_{index:02d}" for index in range(count)]


def coarse(cells: np.ndarray, most: int = 64) -> tuple[np.ndarray, int]:
    """[..., R, R] with ranks in groups of consecutive ones, so that at most `most` rows are left; ranks a group."""
    ranks = cells.shape[-1]
    block = -(-ranks // most)
    begin = np.arange(0, ranks, block)
    return np.add.reduceat(np.add.reduceat(cells, begin, axis=-1), begin, axis=-2), block


def frames(count: int, size: int) -> np.ndarray:
    """Which of `count` samples of `size` cells the page keeps, first and last among them."""
    most = int(np.clip(400_000 // max(1, size), 8, 160))
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def time(run: Run) -> Figure:
    """Seconds of a step, stacked: what the MoE layers do, forward and backward, and everything else."""
    grid = Grid(run)
    found = lambda name: run.metrics.numbers(name, grid.rows)  # noqa: E731
    phases = {name: found(f"perf/phase/{name}") for name in PHASES}
    if not any(np.isfinite(values).any() for values in phases.values()):
        return absent("perf/phase/* was not recorded")
    back = {name: np.nan_to_num(found(f"perf/phase/backward_{name}")) for name in PHASES}
    parts = {name: np.nan_to_num(values) + back[name] for name, values in phases.items()}
    step = found("perf/step_seconds")
    if np.isfinite(forward := found("perf/time/forward")).any():
        inside = sum(np.nan_to_num(values) for values in phases.values())
        parts["other forward"] = np.clip(forward - inside, 0, None)
        parts["other backward"] = np.clip(found("perf/time/backward") - sum(back.values()), 0, None)
        parts["optimizer"] = found("perf/time/update")
        parts["data"] = found("perf/time/data")
    if np.isfinite(step).any():
        parts["the rest"] = np.clip(step - sum(np.nan_to_num(values) for values in parts.values()), 0, None)
    series = [{"name": name, "y": plain(reduce.means(values, grid.begin))} for name, values in parts.items()]
    return {"kind": "area", "x": grid.steps, "series": series, "unit": "seconds a step", "height": 260}


def memory(run: Run) -> Figure:
    """A line a rank where that was recorded, else rank 0's peak."""
    steps, values = run.metrics.lists("perf/memory_gib")
    more: Figure = {"floor": 0, "unit": "GiB"}
    if not len(steps):
        return lines({"perf/peak_memory_gib": ("peak, rank 0", "main")}, "no memory was recorded", **more)(run)
    begin = reduce.edges(len(steps), reduce.MOST_POINTS)
    ends = [*begin[1:], len(steps)]
    mean = reduce.means(values, begin)
    series = [{"name": f"{rank}", "y": plain(mean[:, rank])} for rank in range(values.shape[1])]
    x = [int(steps[end - 1]) for end in ends]
    return {"kind": "lines", "x": x, "series": series, "ordered": True, "label": "rank", **more}


def saved(run: Run) -> Figure:
    """What the plan saved beside what lending took."""
    grid = Grid(run)
    series = [grid.series("saved computing", "balance/saved_seconds", band=True, smoothing=0.7, tone="planned")]
    cost = [run.metrics.numbers(f"perf/phase/{name}", grid.rows) for name in ("lend", "backward_lend")]
    if series[0] is not None and np.isfinite(cost[0]).any():
        spent = reduce.smooth(np.nan_to_num(cost[0]) + np.nan_to_num(cost[1]), 0.7)
        series.append({"name": "spent lending", "y": plain(reduce.means(spent, grid.begin)), "tone": "home"})
    return grid.lines(series, "balance/saved_seconds was not recorded", unit="seconds a step", reference=0)


def domains(run: Run) -> Figure:
    """[layers, domains, experts]: how many times oftener a domain uses an expert than all text does, packed."""
    found = run.specialisation
    if not found:
        return absent("specialisation/step_N.json (written by every held-out evaluation)")
    counts = [np.array(layer["counts"], dtype=float) for layer in found["layers"]]
    experts = [c.shape[1] for c in counts]
    ratio = np.full((len(counts), len(found["domains"]), max(experts)), np.nan)
    for index, counts_CE in enumerate(counts):
        share = counts_CE / np.maximum(counts_CE.sum(-1, keepdims=True), 1)
        mean = share.mean(0)
        ratio[index, :, : experts[index]] = np.divide(share, mean, out=np.zeros_like(share), where=mean > 0)
    return {
        "kind": "domains",
        "step": found.get("step"),
        "domains": found["domains"],
        "layers": [layer.get("name", f"layer_{i:02d}") for i, layer in enumerate(found["layers"])],
        "experts": experts,
        "cells": reduce.pack_load(ratio),
    }


def specialists(run: Run) -> Figure:
    """The most specialised experts of every layer, with the tokens they like."""
    found = [
        {"name": layer.get("name", ""), "experts": layer["experts"]}
        for layer in run.specialisation.get("layers", [])
        if layer.get("experts")
    ]
    if not found:
        return absent("specialisation/step_N.json (written by every held-out evaluation)")
    return {"kind": "specialists", "layers": found}


FIGURES: dict[str, Callable[[Run], Figure]] = {
    "loss": loss,
    "held_out": held_out,
    "load": load,
    "max_vio": per_layer("balance/LAYER/max_vio", "balance/layer_LL/max_vio was not recorded", floor=0),
    "dead": per_layer("balance/LAYER/dead_experts", "balance/layer_LL/dead_experts was not recorded", 0.0, floor=0),
    "entropy": per_layer("balance/LAYER/entropy", "balance/layer_LL/entropy was not recorded", floor=0, share=True),
    "max_vio_micro": per_layer(
        "balance/LAYER/max_vio_micro", "balance/layer_LL/max_vio_micro was not recorded", floor=0
    ),
    "logits": per_layer("balance/LAYER/logit_norm", "balance/layer_LL/logit_norm was not recorded", floor=0),
    "gamma": per_layer("balance/LAYER/gamma_eff", "balance/layer_LL/gamma_eff was not recorded"),
    "devices": devices,
    "imbalance": lines(
        {"balance/imbalance_home": ("at home", "home"), "balance/imbalance_planned": ("planned", "planned")},
        "balance/imbalance_* was not recorded",
        reference=1,
    ),
    "time": time,
    "speed": lines(
        {"perf/tokens_per_second": ("tokens/s", "main")}, "perf/tokens_per_second was not recorded", floor=0
    ),
    "memory": memory,
    "waited": waited,
    "traffic": traffic,
    "moved": lines(
        {
            "balance/rows_moved_fraction": ("computed away from home", "planned"),
            "balance/rows_crossing_fraction": ("crossed a link", "home"),
        },
        "balance/rows_moved_fraction was not recorded",
        floor=0,
        share=True,
    ),
    "guests": lines({"balance/guests": ("guests", "main")}, "balance/guests was not recorded", floor=0),
    "crossing": lines(
        {"balance/crossing_bytes": ("rows", "home"), "balance/lend_bytes": ("expert weights", "planned")},
        "balance/crossing_bytes was not recorded",
        floor=0,
        unit="bytes a step",
    ),
    "saved": saved,
    "domains": domains,
    "specialists": specialists,
    "information": held_out_per_layer(
        "specialise/LAYER/domain_mi", "no held-out evaluation yet (eval.every)", floor=0, unit="bits"
    ),
}

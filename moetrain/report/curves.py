"""Curves and bars of one run, as data. A figure's `kind` names the function of the page's scripts that draws it.

What was not recorded is a figure of kind `absent` with the reason.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moetrain.observe import reduce
from moetrain.observe.collect.meter import PHASES
from moetrain.observe.reduce import plain
from moetrain.report.read import Run

Figure = dict[str, Any]
LAYER = r"layer_\d+(?:_\d+)?"


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
        self.ends = np.array([*self.begin[1:], len(self.rows)], dtype=int)
        self.steps = [self.rows[end - 1]["step"] for end in self.ends] if self.rows else []
        self._metrics = run.metrics

    def series(self, label: str, name: str, band: bool = False, smooth: bool = True, **more: Any) -> Figure | None:
        """One line, smoothed; `raw` is what the step itself reached, `band` keeps each bucket's extremes. None where
        nothing was recorded."""
        values = self._metrics.numbers(name, self.rows)
        if not np.isfinite(values).any():
            return None
        line = reduce.smooth_means(values, self.begin) if smooth else reduce.means(values, self.begin)
        out = {"name": label, "y": plain(line), "raw": plain(values[self.ends - 1]), **more}
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
    whole = grid.series("all", "train/lm_loss", band=True, tone="main")
    each = [grid.series(name, f"train/{name}/loss") for name in domains]
    return grid.lines([whole, *each], "train/lm_loss was not recorded", unit="nats a token", height=300)


def held_out(run: Run) -> Figure:
    """The last evaluation, beside the bigram model where the run has ended."""
    names = [m[1] for name in run.metrics.names if (m := re.fullmatch(r"eval/([^/]+)/bits_per_byte", name))]
    values = {name: run.metrics.last(f"eval/{name}/bits_per_byte") for name in sorted(names)}
    if not values:
        return absent("no held-out evaluation yet (eval.every; one at the end of every run)")
    values["all"] = run.metrics.last("eval/bits_per_byte")
    bigram = {name: run.ended("bigram_bits_per_byte", name) for name in values}
    rows = [{"name": n, "value": v, "mark": bigram[n]} for n, v in values.items() if np.isfinite(v)]
    if not rows:
        return absent("nothing was evaluated: no byte of text is held out")
    return {
        "kind": "bars",
        "rows": rows,
        "unit": "bits a byte",
        "mark": "a bigram model" if np.isfinite([*bigram.values()]).any() else None,
        "digits": 3,
    }


def held_out_steps(run: Run) -> Figure:
    """The same over the run's evaluations."""
    form = re.compile(r"eval/(?:([^/]+)/)?bits_per_byte")
    found = {name: m[1] or "all" for name in run.metrics.names if (m := form.fullmatch(name))}
    rows = [row for row in run.metrics.rows if any(name in row for name in found)]
    if len(rows) < 2:
        return absent("fewer than two held-out evaluations (eval.every)")
    series: list[Figure] = [
        {"name": found[name], "y": plain(run.metrics.numbers(name, rows))}
        for name in sorted(found, key=lambda name: (name != "eval/bits_per_byte", name))
    ]
    series[0] |= {"tone": "main"} if series[0]["name"] == "all" else {}
    return {"kind": "lines", "x": [row["step"] for row in rows], "series": series, "unit": "bits a byte"}


def per_layer(pattern: str, missing: str, smooth: bool = True, **more: Any) -> Callable[[Run], Figure]:
    """A line a layer of the metric that `pattern` names."""

    def draw(run: Run) -> Figure:
        grid = Grid(run)
        found = layers(run, pattern)
        series = [grid.series(name.removeprefix("layer_"), metric, smooth=smooth) for name, metric in found.items()]
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
        found = [grid.series(label, name, band=True, tone=tone) for name, (label, tone) in series.items()]
        return grid.lines(found, missing, **more)

    return draw


def rate(run: Run) -> Figure:
    """The learning rate of the steps themselves: a schedule has corners that a mean would round."""
    grid = Grid(run)
    line = grid.series("learning rate", "train/lr", tone="main")
    return grid.lines([line and line | {"y": line["raw"]}], "train/lr was not recorded", floor=0)


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
    series = [grid.series("saved computing", "balance/saved_seconds", band=True, tone="planned")]
    cost = [run.metrics.numbers(f"perf/phase/{name}", grid.rows) for name in ("lend", "backward_lend")]
    if series[0] is not None and np.isfinite(cost[0]).any():
        spent = np.nan_to_num(cost[0]) + np.nan_to_num(cost[1])
        line = {"y": plain(reduce.smooth_means(spent, grid.begin)), "raw": plain(spent[grid.ends - 1])}
        series.append({"name": "spent lending", **line, "tone": "home"})
    return grid.lines(series, "balance/saved_seconds was not recorded", unit="seconds a step", reference=0)

"""Curves and bars of one run, as data. A figure's `kind` names the function of the page's scripts that draws it.

What was not recorded is a figure of kind `absent` with the reason.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moetrain.observe import reduce
from moetrain.observe.collect.meter import PHASES
from moetrain.observe.metrics import (
    BITS_PER_BYTE,
    DOMAIN_BITS_PER_BYTE,
    DOMAIN_LOSS,
    LM_LOSS,
    LR,
    MEMORY_GIB,
    METRICS,
    PEAK_MEMORY_GIB,
    PHASE,
    SAVED_SECONDS,
    STEP_SECONDS,
    TIME,
)
from moetrain.observe.reduce import plain
from moetrain.report.read import RunData

Figure = dict[str, Any]


def absent(reason: str) -> Figure:
    return {"kind": "absent", "text": reason}


def not_recorded(name: str) -> str:
    """Return the reason of a figure that is absent because the metric `name` is."""
    return f"{name} was not recorded"


def drawn_as(name: str) -> Figure:
    """Return what the registry says of how the metric `name` is drawn: the unit of its axis, and whether it is a
    share."""
    unit = METRICS[name].unit
    return {"unit": unit, "share": True} if unit == "share" else {"unit": unit}


def layers(run: RunData, name: str) -> dict[str, str]:
    """Return {layer: recorded name} of the metric `name`, which has `layer_LL` in it."""
    form = METRICS[name].form
    return dict(sorted((m["layer"], found) for found in run.metrics.names if (m := form.fullmatch(found))))


def by_domain(run: RunData, name: str) -> dict[str, str]:
    """Return {domain: recorded name} of the metric `name`, which has `DOMAIN` in it; `all` is none of them."""
    form = METRICS[name].form
    found = {m["domain"]: name for name in run.metrics.names if (m := form.fullmatch(name))}
    return {domain: found[domain] for domain in sorted(found) if domain != "all"}


def domain_colors(run: RunData) -> dict[str, int]:
    """Return {domain: number of its color}: the same in every figure of the run."""
    domains = sorted({*by_domain(run, DOMAIN_LOSS), *by_domain(run, DOMAIN_BITS_PER_BYTE)})
    return {domain: number for number, domain in enumerate(domains)}


def validation(run: RunData) -> dict[str, str]:
    """Return {`all` or a domain: recorded name} of the validation loss in bits/byte."""
    whole = {"all": BITS_PER_BYTE} if BITS_PER_BYTE in run.metrics.names else {}
    return whole | by_domain(run, DOMAIN_BITS_PER_BYTE)


class BucketedRows:
    """The training rows in at most `MOST_POINTS` buckets."""

    def __init__(self, run: RunData) -> None:
        self.rows = run.metrics.training
        self.begin = reduce.edges(len(self.rows), reduce.MOST_POINTS)
        self.ends = np.array([*self.begin[1:], len(self.rows)], dtype=int)
        self.steps = [self.rows[end - 1]["step"] for end in self.ends] if self.rows else []
        self._metrics = run.metrics

    def series(self, label: str, name: str, band: bool = False, smooth: bool = True, **more: Any) -> Figure | None:
        """Return one line, smoothed; `raw` is what the step itself reached, `band` keeps each bucket's extremes. None
        where nothing was recorded."""
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


def loss(run: RunData) -> Figure:
    grid = BucketedRows(run)
    whole = grid.series("all", LM_LOSS, band=True, tone="main")
    color = domain_colors(run)
    each = [grid.series(d, name, color=color[d]) for d, name in by_domain(run, DOMAIN_LOSS).items()]
    return grid.lines([whole, *each], not_recorded(LM_LOSS), height=300, **drawn_as(LM_LOSS))


def held_out(run: RunData) -> Figure:
    """Draw the last evaluation, beside the bigram model where the run has ended."""
    values = {domain: run.metrics.last(name) for domain, name in by_domain(run, DOMAIN_BITS_PER_BYTE).items()}
    if not values:
        return absent("no evaluation yet (eval.every; every run has one at its end)")
    values["all"] = run.metrics.last(BITS_PER_BYTE)
    bigram = {name: run.ended("bigram_bits_per_byte", name) for name in values}
    rows = [{"name": n, "value": v, "mark": bigram[n]} for n, v in values.items() if np.isfinite(v)]
    if not rows:
        return absent("nothing was evaluated: no text is held out")
    return {
        "kind": "bars",
        "rows": rows,
        **drawn_as(BITS_PER_BYTE),
        "mark": "a bigram model" if np.isfinite([*bigram.values()]).any() else None,
        "digits": 3,
    }


def held_out_steps(run: RunData) -> Figure:
    """Draw the same over the run's evaluations."""
    found, color = validation(run), domain_colors(run)
    rows = [row for row in run.metrics.rows if any(name in row for name in found.values())]
    if len(rows) < 2:
        return absent("fewer than two evaluations (eval.every)")
    series: list[Figure] = [
        {"name": domain, "y": plain(run.metrics.numbers(name, rows)), "color": color.get(domain)}
        for domain, name in found.items()
    ]
    series[0] |= {"tone": "main"} if series[0]["name"] == "all" else {}
    return {"kind": "lines", "x": [row["step"] for row in rows], "series": series, **drawn_as(BITS_PER_BYTE)}


def per_layer(name: str, smooth: bool = True, **more: Any) -> Callable[[RunData], Figure]:
    """Return what draws a line for every layer of the metric `name`, which has `layer_LL` in it."""

    def draw(run: RunData) -> Figure:
        grid = BucketedRows(run)
        found = layers(run, name)
        series = [grid.series(layer.removeprefix("layer_"), metric, smooth=smooth) for layer, metric in found.items()]
        return grid.lines(series, not_recorded(name), ordered=True, prefix="layer", **drawn_as(name), **more)

    return draw


def held_out_per_layer(name: str, missing: str, **more: Any) -> Callable[[RunData], Figure]:
    """Return the same of what evaluations find; `missing`: the reason where there was none."""

    def draw(run: RunData) -> Figure:
        found = layers(run, name)
        rows = [row for row in run.metrics.rows if any(metric in row for metric in found.values())]
        if not rows:
            return absent(missing)
        if len(rows) == 1:
            last = {layer.replace("_", " "): run.metrics.last(metric) for layer, metric in found.items()}
            bars = [{"name": layer, "value": value} for layer, value in last.items() if np.isfinite(value)]
            return {"kind": "bars", "rows": bars, "digits": 2, **drawn_as(name)}
        series = [
            {"name": layer.removeprefix("layer_"), "y": plain(run.metrics.numbers(metric, rows))}
            for layer, metric in found.items()
        ]
        x = [row["step"] for row in rows]
        return {"kind": "lines", "x": x, "series": series, "ordered": True, "prefix": "layer", **drawn_as(name), **more}

    return draw


def lines(series: dict[str, tuple[str, str]], **more: Any) -> Callable[[RunData], Figure]:
    """Return what draws a line for every metric of {metric: (label, tone)}, with each bucket's extremes as a band.

    The first one's unit is that of the axis.
    """
    first = next(iter(series))

    def draw(run: RunData) -> Figure:
        grid = BucketedRows(run)
        found = [grid.series(label, name, band=True, tone=tone) for name, (label, tone) in series.items()]
        return grid.lines(found, not_recorded(first), **drawn_as(first), **more)

    return draw


def rate(run: RunData) -> Figure:
    """Draw the learning rate of the steps themselves: a schedule has corners that a mean would round."""
    grid = BucketedRows(run)
    line = grid.series("learning rate", LR, tone="main")
    return grid.lines([line and line | {"y": line["raw"]}], not_recorded(LR), floor=0, **drawn_as(LR))


def time(run: RunData) -> Figure:
    """Draw the seconds of a step, stacked: what the MoE layers do, forward and backward, and everything else."""
    grid = BucketedRows(run)
    found = lambda name: run.metrics.numbers(name, grid.rows)  # noqa: E731
    phases = {name: found(PHASE[name]) for name in PHASES}
    if not any(np.isfinite(values).any() for values in phases.values()):
        return absent(not_recorded(PHASE["route"]))
    back = {n: np.nan_to_num(found(PHASE[f"backward_{n}"])) for n in PHASES if f"backward_{n}" in PHASE}
    parts = {name: np.nan_to_num(values) + back.get(name, 0) for name, values in phases.items()}
    step = found(STEP_SECONDS)
    if np.isfinite(forward := found(TIME["forward"])).any():
        inside = sum(np.nan_to_num(values) for values in phases.values())
        parts["other forward"] = np.clip(forward - inside, 0, None)
        parts["other backward"] = np.clip(found(TIME["backward"]) - sum(back.values()), 0, None)
        parts["optimizer"] = found(TIME["update"])
        parts["data"] = found(TIME["data"])
    if np.isfinite(step).any():
        parts["the rest"] = np.clip(step - sum(np.nan_to_num(values) for values in parts.values()), 0, None)
    series = [{"name": name, "y": plain(reduce.means(values, grid.begin))} for name, values in parts.items()]
    return {"kind": "area", "x": grid.steps, "series": series, "unit": "s/step", "height": 260}


def memory(run: RunData) -> Figure:
    """Draw a line for every rank where that was recorded, else the peak of the fullest one."""
    steps, values = run.metrics.lists(MEMORY_GIB)
    if not len(steps):
        return lines({PEAK_MEMORY_GIB: ("peak, fullest rank", "main")}, floor=0)(run)
    begin = reduce.edges(len(steps), reduce.MOST_POINTS)
    ends = [*begin[1:], len(steps)]
    mean = reduce.means(values, begin)
    series = [{"name": f"{rank}", "y": plain(mean[:, rank])} for rank in range(values.shape[1])]
    x = [int(steps[end - 1]) for end in ends]
    return {
        "kind": "lines",
        "x": x,
        "series": series,
        "ordered": True,
        "label": "rank",
        "floor": 0,
        **drawn_as(MEMORY_GIB),
    }


def saved(run: RunData) -> Figure:
    """Draw what the plan saved beside what lending took."""
    grid = BucketedRows(run)
    series = [grid.series("saved computing", SAVED_SECONDS, band=True, tone="planned")]
    cost = [run.metrics.numbers(PHASE[name], grid.rows) for name in ("lend", "backward_lend")]
    if series[0] is not None and np.isfinite(cost[0]).any():
        spent = np.nan_to_num(cost[0]) + np.nan_to_num(cost[1])
        line = {"y": plain(reduce.smooth_means(spent, grid.begin)), "raw": plain(spent[grid.ends - 1])}
        series.append({"name": "spent lending", **line, "tone": "home"})
    return grid.lines(series, not_recorded(SAVED_SECONDS), reference=0, **drawn_as(SAVED_SECONDS))

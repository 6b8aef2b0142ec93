"""Several runs side by side: headline numbers, curves over each other, the fields that differ."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moetrain.common.redact import redacted
from moetrain.observe import reduce
from moetrain.observe.metrics import IMBALANCE_PLANNED, LAYER_DOMAIN_MI, LM_LOSS, TOKENS_PER_SECOND
from moetrain.observe.reduce import plain
from moetrain.report.cards import cards
from moetrain.report.curves import BucketedRows, Figure, absent, drawn_as, layers, not_recorded
from moetrain.report.read import RunData

CURVES = {
    "loss": (LM_LOSS, {}),
    "imbalance": (IMBALANCE_PLANNED, {"reference": 1}),
    "speed": (TOKENS_PER_SECOND, {"floor": 0}),
}
BESIDES = ("run.name", "run.dir")  # fields that always differ


def compare(runs: Sequence[RunData], names: Sequence[str]) -> dict[str, Any]:
    return {
        "table": _table(runs, names),
        "figures": {
            **{name: _overlay(runs, names, metric, more) for name, (metric, more) in CURVES.items()},
            "information": _information(runs, names),
        },
        "differences": _differences(runs),
    }


def _table(runs: Sequence[RunData], names: Sequence[str]) -> dict[str, Any]:
    """A row a run. Of a column in which less or more is better, the best is marked."""
    found = [{card["name"]: card for card in cards(run)} for run in runs]
    columns = {name: card["unit"] for each in reversed(found) for name, card in each.items()}
    order = [name for each in sorted(found, key=len, reverse=True) for name in each]
    columns = {name: columns[name] for name in dict.fromkeys(order)}
    rows = []
    for name, each in zip(names, found, strict=True):
        cells = []
        for column in columns:
            card = each.get(column)
            if card is None:
                cells.append({"text": "–", "best": False})
                continue
            numbers = {e[column]["number"] * card["better"] for e in found if column in e}
            others = {number for number in numbers if not np.isnan(number)}
            own = f" {card['unit']}" if card["unit"].startswith("of ") else ""
            best = card["better"] != 0 and len(others) > 1 and card["number"] * card["better"] == max(others)
            cells.append({"text": card["value"] + own, "best": best})
        rows.append({"name": name, "cells": cells})
    shared = [{"text": name, "unit": "" if unit.startswith("of ") else unit} for name, unit in columns.items()]
    return {"columns": shared, "rows": rows}


def _overlay(runs: Sequence[RunData], names: Sequence[str], metric: str, more: Figure) -> Figure:
    series, steps = [], []
    for color, (name, run) in enumerate(zip(names, runs, strict=True)):
        grid = BucketedRows(run)
        if (line := grid.series(name, metric)) is not None:
            series.append({**line, "x": grid.steps, "color": color})
            steps += grid.steps
    if not series:
        return absent(not_recorded(metric))
    x = np.unique(steps)
    x = x[np.unique(np.linspace(0, len(x) - 1, min(len(x), reduce.MOST_POINTS)).round().astype(int))]
    return {"kind": "lines", "x": x.tolist(), "series": series, **drawn_as(metric), **more}


def _information(runs: Sequence[RunData], names: Sequence[str]) -> Figure:
    series, steps = [], []
    for color, (name, run) in enumerate(zip(names, runs, strict=True)):
        metrics = [*layers(run, LAYER_DOMAIN_MI).values()]
        rows = [row for row in run.metrics.rows if any(metric in row for metric in metrics)]
        if rows:
            x = [row["step"] for row in rows]
            mean = np.mean([run.metrics.numbers(metric, rows) for metric in metrics], axis=0)
            series.append({"name": name, "x": x, "y": plain(mean), "color": color})
            steps += x
    if not series:
        return absent("no evaluation (eval.every)")
    return {"kind": "lines", "x": sorted({*steps}), "series": series, "floor": 0, **drawn_as(LAYER_DOMAIN_MI)}


def _differences(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    configs = [flat(redacted(run.config)) for run in runs]
    fields = dict.fromkeys(field for config in configs for field in config)
    rows = [{"field": field, "values": [config.get(field, "–") for config in configs]} for field in fields]
    return [row for row in rows if row["field"] not in BESIDES and len({str(v) for v in row["values"]}) > 1]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return {`model.dim`: its value as text}."""
    out: dict[str, str] = {}
    for name, value in config.items():
        nested = isinstance(value, dict)
        out |= (
            flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": "null" if value is None else str(value)}
        )
    return out

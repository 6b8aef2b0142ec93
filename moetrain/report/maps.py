"""What has two sides, as data: layers × experts, devices, ranks × ranks, domains × experts; over the steps."""

import numpy as np

from moetrain.observe import reduce
from moetrain.observe.metrics import DEVICE_LOAD_HOME, DEVICE_LOAD_PLANNED, LAYER_LOAD, STEP_SECONDS
from moetrain.report.curves import Figure, absent, layers, not_recorded
from moetrain.report.read import RunData


def load(run: RunData) -> Figure:
    """Return [frames, layers, experts] in mean loads, packed: every frame the mean of the rows it stands for."""
    found = {name: run.metrics.lists(metric) for name, metric in layers(run, LAYER_LOAD).items()}
    found = {name: pair for name, pair in found.items() if len(pair[0])}
    if not found:
        return absent(not_recorded(LAYER_LOAD))
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


def devices(run: RunData) -> Figure:
    """Return [frames, layers, ranks] in mean loads: at home, planned, and what of the latter guests computed.

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
        steps, home = (x[:, None] if x.ndim > 1 else x for x in run.metrics.lists(DEVICE_LOAD_HOME))
        planned = run.metrics.lists(DEVICE_LOAD_PLANNED)[1][:, None]
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


def traffic(run: RunData) -> Figure:
    """Return [frames, layers, source, destination]: rows that travelled, in percent of the layer's rows."""
    if "traffic" not in run.trace:
        return absent("the load trace has no traffic")
    steps, rows = run.trace["step"], run.trace["traffic"]
    total = np.maximum(rows.sum((-2, -1), keepdims=True), 1)
    rows, block = coarse(rows * (1 - np.eye(rows.shape[-1], dtype=rows.dtype)))
    kept = frames(len(steps), rows[0].size)
    share = rows[kept] / total[kept]
    most = max(usual_most(share), min(1.0, 4 / rows.shape[-1] ** 2))  # four even shares: an even plan is pale
    return {
        "kind": "matrix",
        "steps": steps[kept].tolist(),
        "layers": trace_layers(run),
        "size": rows.shape[-1],
        "block": block,
        "most": most,
        "cells": reduce.pack_thousandths(share / most),
        "what": "of the rows went from rank {row} to rank {column}",
        "unit": "share",
    }


def waited(run: RunData) -> Figure:
    """Return [frames, 1, who, for whom] in seconds of a step."""
    found = run.trace.get("waited")
    if found is None or not np.isfinite(found).any():
        return absent("the load trace has no waiting times")
    steps, (seconds, block) = run.trace["step"], coarse(np.nan_to_num(found))
    kept = frames(len(steps), seconds[0].size)
    step = run.metrics.numbers(STEP_SECONDS)
    step = step[np.isfinite(step)]
    quarter = block * step.mean() / 4 if len(step) else 0.0  # of a step, for each rank of a block: short waits are pale
    most = float(max(usual_most(seconds[kept]), quarter))
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


def domains(run: RunData) -> Figure:
    """Return [layers, domains, experts]: how many times oftener a domain uses an expert than all text does, packed."""
    found = run.specialisation
    if not found:
        return absent("specialisation/step_N.json was not recorded; every evaluation writes it")
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


def specialists(run: RunData) -> Figure:
    """Return the most specialised experts of every layer, with the tokens they like."""
    found = [
        {"name": layer.get("name", ""), "experts": layer["experts"]}
        for layer in run.specialisation.get("layers", [])
        if layer.get("experts")
    ]
    if not found:
        return absent("specialisation/step_N.json was not recorded; every evaluation writes it")
    return {"kind": "specialists", "layers": found}


def trace_layers(run: RunData) -> list[str]:
    """Return the names of the trace's layers; older traces have none."""
    if "layers" in run.trace:
        return run.trace["layers"].tolist()
    count = run.trace["home"].shape[1] if "home" in run.trace else 0
    names = [*layers(run, LAYER_LOAD)]
    return names if len(names) == count else [f"layer_{index:02d}" for index in range(count)]


def usual_most(cells: np.ndarray) -> float:
    """Return the largest cell of three frames in four: outliers do not make all others pale."""
    return float(max(np.quantile(cells.reshape(len(cells), -1).max(1), 0.75), 1e-9))


def coarse(cells: np.ndarray, most: int = 64) -> tuple[np.ndarray, int]:
    """Return [..., R, R] with ranks in groups of consecutive ones, so that at most `most` rows are left; ranks a
    group."""
    ranks = cells.shape[-1]
    block = -(-ranks // most)
    begin = np.arange(0, ranks, block)
    return np.add.reduceat(np.add.reduceat(cells, begin, axis=-1), begin, axis=-2), block


def frames(count: int, size: int) -> np.ndarray:
    """Return which of `count` samples of `size` cells the page keeps, first and last among them."""
    most = int(np.clip(400_000 // max(1, size), 8, 160))
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))

"""The headline numbers of a run, and the line that says what it is."""

from typing import Any

import numpy as np

from moetrain.observe.collect.congestion import NAMES
from moetrain.observe.estimate import short
from moetrain.observe.metrics import (
    BITS_PER_BYTE,
    DEVICE_LOAD_HOME,
    GAMMA_EFF,
    GAMMA_PHASE,
    GUESTS,
    IMBALANCE_HOME,
    IMBALANCE_PLANNED,
    LAYER_LOAD,
    LM_LOSS,
    MEMORY_GIB,
    METRICS,
    MFU,
    PEAK_MEMORY_GIB,
    ROWS_MOVED_FRACTION,
    SAVED_SECONDS,
    STEP_SECONDS,
    TOKENS,
    TOKENS_PER_SECOND,
)
from moetrain.report.curves import layers
from moetrain.report.findings import recent, recent_list, spent_lending, window
from moetrain.report.read import RunData


def about(run: RunData) -> str:
    """Return one line, of what the config tells."""
    option, parts = run.option, []
    if ranks := run.metrics.lists(DEVICE_LOAD_HOME)[1].shape[1]:
        parts.append(f"{ranks} ranks")
    total, active = run.ended("parameters", "total"), run.ended("parameters", "active")
    if np.isfinite(total + active):
        parts.append(f"{short(total)} parameters, {short(active)} active per token")
    if option("model"):
        parts.append(f"{option('model.num_layers')} layers × {option('model.num_experts')} experts")
    if option("router"):
        parts.append(f"router {option('router.name')}, top-{option('router.top_k')}")
        parts += [f"router.skew={option('router.skew')}"] if option("router.skew") else []
    if option("planner"):
        parts.append(f"planner {option('planner.name')}")
    if option("balance"):
        parts.append(f"balance loss over the {option('balance.scope')} batch")
    if option("train"):
        parts.append(str(option("train.dtype")))
    return " · ".join(parts) or "the configuration could not be read"


def circumstances(run: RunData) -> list[tuple[str, str]]:
    """Return (what, text) of how the run was made, as its last start says; [] of a run that did not record it."""
    if not run.starts:
        return []
    last, known = run.starts[-1], [row for row in run.starts if _is_seconds(row.get("seconds"))]
    found = []
    if known:
        seconds = round(sum(row["seconds"] for row in known))
        spent = f"{seconds // 3600} h {seconds // 60 % 60:02d} min" if seconds >= 3600 else f"{seconds / 60:.1f} min"
        spent = spent if seconds >= 60 else f"{seconds} s"
        some = len(known) < len(run.starts)
        found = [
            (
                "Wall time",
                spent + f", sum of {len(known)} of {len(run.starts)} starts; the others recorded no end" * some,
            )
        ]
    if resumed := run.resumed:
        found.append(("Resumed", "after step " + ", ".join(f"{step:,}" for step in resumed)))
    labels = {"time": "Started", "hardware": "Hardware", "versions": "Versions", "command": "Command"}
    return found + [(label, last[key]) for key, label in labels.items() if isinstance(last.get(key), str)]


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1e10


def cards(run: RunData) -> list[dict[str, Any]]:
    """Return `{name, value, unit, note}` of each card; those that nothing was recorded for are left out. `number` is
    for comparing."""
    drawn = (_progress, _held_out, _loss, _speed, _imbalance, _saved, _moved, _experts, _congestion, _memory)
    return [card for draw in drawn if (card := draw(run)) is not None]


def _card(name: str, value: str, unit: str, note: str, number: float, better: int = 0) -> dict[str, Any]:
    """`better`: 1 where more is, -1 where less is, 0 where neither."""
    return {"name": name, "value": value, "unit": unit, "note": note, "number": number, "better": better}


def _progress(run: RunData) -> dict[str, Any] | None:
    if not run.metrics.rows:
        return None
    step, wanted = max(row["step"] for row in run.metrics.rows), run.whole("train.steps")
    tokens = run.metrics.last(TOKENS)
    note = f"{short(tokens)} tokens" if np.isfinite(tokens) else ""
    return _card("Steps", f"{step:,}", f"of {wanted:,}" if wanted else "", note, step)


def _held_out(run: RunData) -> dict[str, Any] | None:
    value = run.metrics.last(BITS_PER_BYTE)
    if np.isnan(value):
        asked = any(BITS_PER_BYTE in row for row in run.metrics.rows)
        return _card("Validation loss", "–", "", "nothing was evaluated", float("nan"), -1) if asked else None
    bigram = run.ended("bigram_bits_per_byte", "all")
    note = f"bigram model: {bigram:.3f}" if np.isfinite(bigram) else "at the last evaluation"
    return _card("Validation loss", f"{value:.3f}", METRICS[BITS_PER_BYTE].unit, note, value, -1)


def _loss(run: RunData) -> dict[str, Any] | None:
    values = run.metrics.numbers(LM_LOSS)
    values = values[np.isfinite(values)].tolist()
    if not values:
        return None
    note = f"at the last step, from {values[0]:.3f}"
    return _card("Training loss", f"{values[-1]:.3f}", METRICS[LM_LOSS].unit, note, values[-1], -1)


def _speed(run: RunData) -> dict[str, Any] | None:
    values = run.metrics.numbers(TOKENS_PER_SECOND)
    if not np.isfinite(values).any():
        return None
    value, used = float(np.nanmedian(values)), recent(run, MFU)
    note = "median" + (f"; MFU {used:.1%}" if np.isfinite(used) else "")
    expected = run.predicted("tokens_per_second")
    note += f"; predicted {expected:,.0f}" if np.isfinite(expected) else ""
    return _card("Throughput", f"{value:,.0f}", METRICS[TOKENS_PER_SECOND].unit, note, value, 1)


def _imbalance(run: RunData) -> dict[str, Any] | None:
    home, planned = (recent(run, name) for name in (IMBALANCE_HOME, IMBALANCE_PLANNED))
    if np.isnan(planned):
        return None
    return _card(
        "Device imbalance",
        f"{home:.2f} → {planned:.2f}",
        "",
        "busiest device over the mean: experts at home → as planned",
        planned,
        -1,
    )


def _saved(run: RunData) -> dict[str, Any] | None:
    value, step = recent(run, SAVED_SECONDS), recent(run, STEP_SECONDS)
    if np.isnan(value):
        return None
    note = f"{value / step:.1%} of a step" if step > 0 else "of computing time"
    if np.isfinite(spent := spent_lending(run)):
        note += f"; lending took {1e3 * spent:,.3g} ms"
    return _card("Saved by the plan", f"{1e3 * value:,.3g}", "ms/step", note, value, 1)


def _moved(run: RunData) -> dict[str, Any] | None:
    value, guests = recent(run, ROWS_MOVED_FRACTION), recent(run, GUESTS)
    if np.isnan(value):
        return None
    return _card("Rows moved", f"{value:.1%}", "", f"{guests:,.3g} guests/step" + _sampled(run), value)


def _sampled(run: RunData) -> str:
    """Says so where not every step has a row: sums over steps are estimates then."""
    every = run.whole("train.log_every") or 1
    return f", estimated from every {every}th step" if every > 1 else ""


def _experts(run: RunData) -> dict[str, Any] | None:
    total = used = rows = 0
    for metric in layers(run, LAYER_LOAD).values():
        _, values = run.metrics.lists(metric)
        total += values.shape[1]
        rows = len(values[window(len(values))])
        used += int((values[window(len(values))] > 0).any(0).sum())
    if not total:
        return None
    return _card(
        "Experts in use", f"{used}", f"of {total}", f"selected in the last {rows} recorded steps", used / total, 1
    )


def _congestion(run: RunData) -> dict[str, Any] | None:
    value, phase = recent(run, GAMMA_EFF), run.metrics.numbers(GAMMA_PHASE)[-1:]
    if np.isnan(value):
        return None
    known = NAMES.get(int(phase[0])) if np.isfinite(phase).any() else None  # of the last row, not of one long past
    note = known or "no phase: fewer than 20 recorded steps since the start"
    return _card("Congestion coefficient γ̂", f"{value:.3g}", "", note, value)


def _memory(run: RunData) -> dict[str, Any] | None:
    ranks = recent_list(run, MEMORY_GIB)
    value = float(ranks.max()) if len(ranks) else run.metrics.last(PEAK_MEMORY_GIB)
    if np.isnan(value):
        return None
    expected = run.predicted("memory_bytes") / 2**30
    note = "on the fullest rank" + (f"; predicted {expected:.2f}" if np.isfinite(expected) else "")
    return _card("Memory", f"{value:.2f}", "GiB", note, value, -1)

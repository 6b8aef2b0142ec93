"""What the numbers of a run say, in sentences: trouble first. docs/read-the-dashboard.md explains every threshold.

A finding is about the run's last tenth (at least ten rows), so that what has passed is not held against it.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from moetrain.observe import reduce
from moetrain.observe.collect.meter import PHASES
from moetrain.observe.metrics import (
    DEVICE_LOAD_PLANNED,
    GUESTS,
    IMBALANCE_HOME,
    IMBALANCE_PLANNED,
    LAYER_LOAD,
    LM_LOSS,
    MEMORY_GIB,
    PHASE,
    SAVED_SECONDS,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    WAITED,
    WAITED_FOR,
)
from moetrain.observe.summary import beaten
from moetrain.report.curves import layers, validation
from moetrain.report.read import RunData

DEAD, STARVING, HOT = 0.0, 0.1, 4.0  # of an expert's load, in mean loads
COLLAPSED = 0.8  # share of all selections that the top_k most loaded experts take
UNEVEN, LOPSIDED = 1.10, 1.25  # busiest device over the mean, after planning
WAITING, STALLED = 0.2, 0.4  # share of a step that ranks wait for each other
TRAVELLING, CLOGGED = 0.3, 0.5  # share of a step in exchanges, waiting left out
UNPROFITABLE = 0.01  # share of a step that lending takes beyond what it saves
SLOWER, GROWN = 0.8, 1.15  # tokens a second, memory: of what they were
RISEN, SCATTER = 0.05, 3.0  # of the loss over its lowest: in shares of that, and in standard errors of the difference
LEFT = {  # why a plan may leave an imbalance
    "home": "planner=home moves nothing; planner=makespan moves rows where that saves time",
    "makespan": "moving more rows would take longer than waiting, or there is no memory for guests "
    "(costs.json, engine.guest_memory_mib)",
}
SECTIONS = {"dead_experts": "experts", "imbalance": "devices", "not_finite": "loss"}  # that alerts are about


class Finding(NamedTuple):
    level: Literal["trouble", "watch", "good"]
    text: str
    section: str  # of the page


def findings(run: RunData) -> list[Finding]:
    found = [*_loss(run), *_experts(run), *_devices(run), *_plan(run), *_time(run), *_memory(run), *_alerts(run)]
    return sorted(found, key=lambda f: ("trouble", "watch", "good").index(f.level))


def window(count: int) -> slice:
    return slice(-max(10, count // 10), None)


def recent(run: RunData, name: str) -> float:
    """Return the mean over the window; NaN where nothing was recorded."""
    values = run.metrics.numbers(name)
    values = values[window(len(values))]
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")


def recent_list(run: RunData, name: str) -> np.ndarray:
    """Return [width]: the mean over the window; empty where nothing was recorded."""
    _, values = run.metrics.lists(name)
    return np.nan_to_num(values[window(len(values))]).mean(0) if len(values) else np.zeros(0)


def _loss(run: RunData) -> list[Finding]:
    rows = run.metrics.training
    values = run.metrics.numbers(LM_LOSS)
    out = []
    bits = {domain: run.metrics.last(name) for domain, name in validation(run).items()}
    if (text := beaten(bits, {domain: run.ended("bigram_bits_per_byte", domain) for domain in bits})) is not None:
        out.append(Finding("trouble" if text.startswith("The") else "watch", text, "loss"))
    if len(lost := [row["step"] for row, x in zip(rows, values, strict=True) if not np.isfinite(x)]):
        out.append(
            Finding("trouble", f"The loss was not finite in {len(lost)} step(s), the first is step {lost[0]}.", "loss")
        )
    width = -window(len(values)).start
    begin = np.arange(len(values) % width, len(values), width)  # of windows that end with the run
    means = reduce.means(values, begin)
    if np.isfinite(means[-1:]).any():
        best = int(np.nanargmin(means))
        lowest = slice(begin[best], begin[best] + width)
        error = np.sqrt((np.nanvar(values[lowest]) + np.nanvar(values[-width:])) / width)
        if (rise := means[-1] - means[best]) > max(RISEN * abs(means[best]), SCATTER * error):
            first, last = (rows[lowest][at]["step"] for at in (0, -1))
            text = (
                f"The training loss ends {rise:.2f} nats/token above its lowest mean, that of steps {first} to {last}."
            )
            out.append(Finding("watch", text, "loss"))
    return out


def _experts(run: RunData) -> list[Finding]:
    out: list[Finding] = []
    dead, starving, hot = [], [], []
    top_k = run.whole("router.top_k") or 2
    found = {name: run.metrics.lists(metric)[1] for name, metric in layers(run, LAYER_LOAD).items()}
    found = {name: values for name, values in found.items() if values.size}
    span = min((len(values[window(len(values))]) for values in found.values()), default=0)
    for name, values in found.items():
        values = values[window(len(values))]
        load, layer = values.mean(0) * values.shape[1], name.replace("_", " ")
        top = np.argsort(-load)[:top_k]
        share = load[top].sum() / len(load)
        if share > COLLAPSED and len(load) >= 4 * top_k:
            text = (
                f"{layer}: {_experts_named(sorted(top.tolist()))} take {share:.0%} of all selections: router collapse."
            )
            out.append(Finding("trouble", text, "experts"))
        elif load.max() > HOT:
            hot.append(f"expert {load.argmax()} of {layer} ({load.max():.1f} × the mean)")
        if none := np.flatnonzero((values == DEAD).all(0)).tolist():
            dead.append(f"{layer}: {_experts_named(none)}")
        if few := np.flatnonzero((load < STARVING) & ~(values == DEAD).all(0)).tolist():
            starving.append(f"{layer}: {_experts_named(few)}")
    if dead:
        out.append(
            Finding(
                "trouble",
                f"Dead experts, selected by no token in the last {span} recorded steps: {_some(dead)}.",
                "experts",
            )
        )
    if starving:
        out.append(
            Finding(
                "watch", f"Starving experts, with less than a tenth of an even share: {_some(starving)}.", "experts"
            )
        )
    if hot:
        out.append(
            Finding("watch", f"Hot experts, with more than {HOT:.0f} times an even share: {_some(hot)}.", "experts")
        )
    if found and not out:
        total = sum(values.shape[1] for values in found.values())
        idle = sum(int((values[-1] == DEAD).sum()) for values in found.values())
        text = f"Every expert of every layer was selected in the last {span} recorded steps"
        text += f"; in the last one alone, {idle} of {total} were not" if idle else ""
        out.append(Finding("good", text + ".", "experts"))
    return out


def _devices(run: RunData) -> list[Finding]:
    home, planned = (recent(run, name) for name in (IMBALANCE_HOME, IMBALANCE_PLANNED))
    if np.isnan(planned):
        return []
    text = f"Load of the busiest device over the mean: {home:.2f} with experts at home, {planned:.2f} as planned"
    level: Literal["trouble", "watch", "good"] = "good"
    if planned > UNEVEN:
        level = "trouble" if planned > LOPSIDED else "watch"
        text += f": {LEFT.get(str(run.option('planner.name')), 'the plan leaves that imbalance')}"
        load = recent_list(run, DEVICE_LOAD_PLANNED)
        if len(load) and (most := load.max() / max(load.mean(), 1e-9)) > UNEVEN:
            text += f". Most of it is device {load.argmax()}, with {most:.2f} times the mean load over all layers"
    return [Finding(level, text + ".", "devices")]


def spent_lending(run: RunData) -> float:
    """Return the seconds of a step that lending takes, forward and backward; NaN where nothing was recorded."""
    forward, backward = recent(run, PHASE["lend"]), recent(run, PHASE["backward_lend"])
    return forward + np.nan_to_num(backward)


def _plan(run: RunData) -> list[Finding]:
    saved, spent, step = recent(run, SAVED_SECONDS), spent_lending(run), recent(run, STEP_SECONDS)
    if not recent(run, GUESTS) > 0 or not spent - saved > UNPROFITABLE * step:
        return []
    text = f"Lending experts takes {1e3 * spent:.3g} ms/step and saves {1e3 * saved:.3g} ms/step of computing time."
    return [Finding("watch", text, "plan")]


def exchanging(run: RunData) -> float:
    """Return the share of the window's steps in exchanges, waiting left out; NaN where nothing was recorded.

    Where waiting was recorded in some of the steps, it is about those alone: the two are never of different steps.
    """
    rows = run.metrics.training[window(len(run.metrics.training))]
    names = [PHASE[f"{side}{name}"] for side in ("", "backward_") for name in ("lend", "dispatch", "combine")]
    spent, step = [run.metrics.numbers(name, rows) for name in names], run.metrics.numbers(STEP_SECONDS, rows)
    at, values = run.metrics.lists(WAITED)
    waits = dict(zip(at.tolist(), values.mean(1).tolist(), strict=True)) if len(at) else {}
    waited = np.array([waits.get(row["step"], np.nan) for row in rows])
    known = np.isfinite(step) & np.isfinite(spent).any(0)
    if (both := known & np.isfinite(waited)).any():
        known = both
    if not known.any():
        return float("nan")
    moving = np.clip(np.nansum(spent, axis=0) - np.nan_to_num(waited), 0, None)
    return float(moving[known].sum() / step[known].sum())


def _time(run: RunData) -> list[Finding]:
    step = recent(run, STEP_SECONDS)
    if np.isnan(step) or step <= 0:
        return []
    out = []
    waited, waited_for = recent_list(run, WAITED), recent_list(run, WAITED_FOR)
    waiting = float(waited.mean()) if len(waited) else 0.0
    if waiting / step > WAITING:
        text = f"Ranks wait for each other during {waiting / step:.0%} of a step"
        if waited_for.sum() > 0:
            text += f", {waited_for.max() / waited_for.sum():.0%} of that for rank {waited_for.argmax()}"
        out.append(Finding("trouble" if waiting / step > STALLED else "watch", text + ".", "devices"))
    moving = exchanging(run)
    if moving > TRAVELLING:
        text = f"Exchanges between ranks take {moving:.0%} of a step, without waiting: "
        text += "the link is slow, or the micro-batch is small."
        out.append(Finding("trouble" if moving > CLOGGED else "watch", text, "time"))
    speed = run.metrics.numbers(TOKENS_PER_SECOND)
    quarter = len(speed) // 4
    if quarter >= 10:
        before, after = np.nanmedian(speed[quarter : 2 * quarter]), np.nanmedian(speed[-quarter:])
        if after < SLOWER * before:
            text = f"Throughput fell from {before:,.0f} tokens/s in the second quarter to {after:,.0f} in the last."
            out.append(Finding("watch", text, "time"))
    if not out and any(np.isfinite(recent(run, PHASE[name])) for name in PHASES):
        part = f", {moving:.0%} of it in exchanges between ranks" if np.isfinite(moving) else ""
        out.append(Finding("good", f"A step takes {step:.3g} s{part}.", "time"))
    return out


def _memory(run: RunData) -> list[Finding]:
    _, values = run.metrics.lists(MEMORY_GIB)
    if len(values) < 200:  # caches fill in the first steps
        return []
    before, after = (values[part].mean(0) for part in (slice(len(values) // 4, len(values) // 2), window(len(values))))
    growth = after / np.maximum(before, 1e-9)
    if growth.max() <= GROWN:
        return []
    rank = int(growth.argmax())
    text = (
        f"Memory of rank {rank} grows: {before[rank]:.2f} GiB in the second quarter, {after[rank]:.2f} GiB at the end."
    )
    return [Finding("watch", text, "devices")]


def _alerts(run: RunData) -> list[Finding]:
    if not run.alerts:
        return []
    last: dict[str, Any] = run.alerts[-1]
    count = "One alert" if len(run.alerts) == 1 else f"{len(run.alerts)} alerts"
    text = f"{count} during the run, the last at step {last['step']}: {last['text'].rstrip('.')}."
    return [Finding("watch", text, SECTIONS.get(last["kind"], "devices"))]


def _experts_named(numbers: list[int]) -> str:
    if len(numbers) > 6:
        return f"{len(numbers)} experts"
    return ("expert " if len(numbers) == 1 else "experts ") + ", ".join(str(n) for n in numbers)


def _some(texts: list[str], most: int = 4) -> str:
    more = f"; and {len(texts) - most} layers more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more

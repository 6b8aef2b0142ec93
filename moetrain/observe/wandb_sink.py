"""Weights & Biases: offline in the run's folder unless a key is set.

Sections of the automatic workspace are what stands before the first slash of a name. What is of one layer is kept out
of it: its charts would bury the others. In its place `experts/load` shows all layers at sampled steps.
"""

import logging
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config import Config
from moetrain.observe.alerts import Alert
from moetrain.observe.arrays import Array
from moetrain.observe.tracker import Metrics

MOST_BINS = 512  # that a histogram may have
CELL = 12  # pixels of an expert in the heat map
ALERT_WAIT_SECONDS = 600
COLD, EVEN, HOT = np.array([[33, 70, 140], [245, 245, 240], [190, 40, 30]], dtype=float)  # colours of the heat map


class Wandb:
    """Lists become histograms: over the steps, heat maps of experts or devices."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder, self._layers = config, folder, config.model.pass_names

    @cached_property
    def _run(self) -> Any:
        """Begins with the first row: its second or two do not come before the first step."""
        import wandb

        config = self._config
        logging.getLogger("wandb").setLevel(logging.ERROR)
        online = "WANDB_API_KEY" in os.environ and os.environ.get("WANDB_MODE") != "offline"
        run = wandb.init(
            project=config.track.project,
            name=config.run.name,
            dir=self._folder,
            config=config.model_dump(mode="json"),
            mode="online" if online else "offline",
            settings=wandb.Settings(silent=not online, console="off", x_disable_stats=True),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        for prefix in ("balance/layer_", "eval/layer_", "specialise/layer_"):
            run.define_metric(f"{prefix}*", step_metric="step", hidden=True)
        return run

    def log(self, step: int, metrics: Metrics) -> None:
        import wandb

        shown: dict[str, Any] = {}
        for name, value in metrics.items():
            if isinstance(value, list):
                counts = _bins(np.array(value, dtype=float))
                value = wandb.Histogram(np_histogram=(counts, np.linspace(0, len(value), len(counts) + 1)))
            shown[name] = value
        if "perf/waited" in metrics:  # the step is a sample of the load trace
            loads = [np.array(metrics[f"balance/{layer}/load"]) for layer in self._layers]
            shown["experts/load"] = wandb.Image(
                heat_map(loads),
                caption="rows: layers from above; columns: experts. White: an even share; red: twice it",
            )
        self._run.log({"step": step, **shown})

    def alert(self, step: int, alert: Alert) -> None:
        title = f"{alert.kind.replace('_', ' ')} at step {step}"
        self._run.alert(title, alert.text, level="WARN", wait_duration=ALERT_WAIT_SECONDS)

    def close(self) -> None:
        if "_run" in vars(self):
            self._run.finish()


def heat_map(loads: list[Array]) -> Array:
    """uint8 [height, width, 3]: a row for every layer, from shares of selections [E]: blue none, white even, red twice
    that or more."""
    wide = max(len(share_E) for share_E in loads)
    cells = np.full((len(loads), wide, 3), 255.0)
    for layer, share_E in enumerate(loads):
        evenness = np.clip(share_E * len(share_E), 0, 2)[:, None]
        cold, hot = COLD + (EVEN - COLD) * evenness, EVEN + (HOT - EVEN) * (evenness - 1)
        cells[layer, : len(share_E)] = np.where(evenness < 1, cold, hot)
    return np.kron(cells, np.ones((CELL, CELL, 1))).astype(np.uint8)


def _bins(values: Array) -> Array:
    """At most `MOST_BINS` sums of neighbours."""
    group = -(-len(values) // MOST_BINS)
    return np.add.reduceat(values, np.arange(0, len(values), group))

"""Weights & Biases: online where the user is logged in, else offline in the run's folder.

What wandb's own environment variables and settings files say holds wherever the configuration says nothing.

Sections of the automatic workspace are what stands before the first slash of a name. What is of one layer is kept out
of it: its charts would bury the others. In its place `experts/load` shows all layers at sampled steps.
"""

import logging
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.common import disk
from moetrain.common.arrays import Array
from moetrain.common.console import console
from moetrain.common.redact import redacted, redacted_text
from moetrain.config import Config
from moetrain.observe.collect.alerts import Alert
from moetrain.observe.metrics import LAYER_LOAD, LOAD_IMAGE, WAITED, for_layer, layer_prefixes
from moetrain.observe.sinks.tracker import Metrics, one_line

MOST_BINS = 512  # that a histogram may have
CELL = 12  # pixels of an expert in the heat map
ALERT_WAIT_SECONDS = 600
INIT_SECONDS, FINISH_SECONDS = 30.0, 120.0  # that a run waits for a server at its start, and at its end for uploads
ID = re.compile(r"[\w-]{1,64}")
COLD, EVEN, HOT = np.array([[33, 70, 140], [245, 245, 240], [190, 40, 30]], dtype=float)  # colors of the heat map


class Wandb:
    """Lists become histograms: over the steps, heat maps of experts or devices.

    Begins when it is made, which takes a second or two; where wandb cannot be reached, the run is kept offline.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        self._layers = config.model.pass_names
        logging.getLogger("wandb").setLevel(logging.CRITICAL)  # what goes wrong is said in our own line
        mode = _mode()
        try:
            self._run = _begin(config, folder, mode)
        except Exception as error:  # its own, and those of its connection
            if mode != "online":
                raise
            with suppress(Exception):
                wandb.teardown(1)  # else its process still holds the run's id
            self._run = _begin(config, folder, "offline")
            kept = Path(self._run.dir).parent
            console.print(f"wandb: {one_line(error)}; offline for now, `wandb sync {kept}` uploads it")
        else:
            if mode == "online":
                console.print(f"wandb: {self._run.url}")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for prefix in layer_prefixes():
            self._run.define_metric(f"{prefix}*", step_metric="step", hidden=True)

    def log(self, step: int, metrics: Metrics) -> None:
        import wandb

        shown: dict[str, Any] = {}
        for name, value in metrics.items():
            if isinstance(value, list):
                counts = _bins(np.array(value, dtype=float))
                value = wandb.Histogram(np_histogram=(counts, np.linspace(0, len(value), len(counts) + 1)))
            shown[name] = value
        if WAITED in metrics:  # the step is a sample of the load trace
            loads = [np.array(metrics[for_layer(LAYER_LOAD, layer)]) for layer in self._layers]
            shown[LOAD_IMAGE] = wandb.Image(
                heat_map(loads),
                caption="Rows: layers, the first on top; columns: experts. White: an even share, red: twice that.",
            )
        self._run.log({"step": step, **shown})

    def alert(self, step: int, alert: Alert) -> None:
        title = f"{alert.kind.replace('_', ' ')} at step {step}"
        self._run.alert(title, alert.text, level="WARN", wait_duration=ALERT_WAIT_SECONDS)

    def close(self) -> None:
        import wandb

        try:
            self._run.finish()
        except Exception:
            with suppress(Exception):
                wandb.teardown(1)  # else its hook at the exit of the process prints a traceback
            raise


def _begin(config: Config, folder: Path, mode: Any) -> Any:
    """wandb's run, of the id that is kept in the run's folder."""
    import wandb

    track, ours = config.track, {"silent": True, "console": "off", "finish_timeout": FINISH_SECONDS}
    ours["init_timeout"] = min(INIT_SECONDS, config.recovery.timeout / 2)  # the other ranks wait meanwhile
    known = wandb.Settings.model_fields
    if not os.environ.get("WANDB_DIR"):
        disk.make_own(folder / "wandb")
    settings = {k: v for k, v in ours.items() if k in known and f"WANDB_{k.upper()}" not in os.environ}
    with _arguments_without_secrets():
        return wandb.init(
            project=track.project or os.environ.get("WANDB_PROJECT") or "moetrain",
            entity=track.entity,
            group=track.group,
            tags=track.tags or None,
            job_type=track.job_type,
            notes=redacted_text(track.notes) if track.notes else track.notes,
            name=None if os.environ.get("WANDB_NAME") else config.run.name,
            id=_run_id(folder),
            resume=None if os.environ.get("WANDB_RESUME") else "allow",
            dir=None if os.environ.get("WANDB_DIR") else folder,
            config=redacted(config.model_dump(mode="json")),
            mode=mode,
            settings=wandb.Settings(**settings),
        )


@contextmanager
def _arguments_without_secrets() -> Iterator[None]:
    """wandb keeps the command line of a run in its metadata, and reads it from `sys.argv`."""
    kept = sys.argv
    sys.argv = [*kept[:1], *map(redacted_text, kept[1:])]
    try:
        yield
    finally:
        sys.argv = kept


def _mode() -> str:
    """As wandb's settings say; offline where it would be online and nobody is logged in: nothing may ask for a key."""
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    if settings.mode != "online":
        return str(settings.mode)
    keys = (os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_IDENTITY_TOKEN_FILE"), settings.api_key)
    return "online" if any(keys) or get_netrc_auth(settings.base_url) else "offline"


def _run_id(folder: Path) -> str:
    """That of the run in `folder`, kept in its `wandb_id`: a run that goes on is one run."""
    path, asked = folder / "wandb_id", os.environ.get("WANDB_RUN_ID")
    with suppress(OSError, ValueError):
        if not asked and ID.fullmatch(known := disk.read(path).decode().strip()):
            return known
    new = asked or secrets.token_hex(4)
    with suppress(OSError):  # a full disk: the next start is another run
        disk.write(path, new + "\n")
    return new


def heat_map(loads: list[Array]) -> Array:
    """Return uint8 [height, width, 3]: a row for every layer, from shares of selections [E]: blue none, white even, red
    twice that or more."""
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

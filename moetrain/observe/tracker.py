"""Where metrics go: one tracker, many sinks. A rank that does not report has a tracker without sinks."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moetrain.config import Config
from moetrain.observe.console import console

Metrics = Mapping[str, Any]


class Sink(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Hands metrics to every sink. Names are those of `docs/metrics.md`; values numbers or lists of numbers."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = sinks

    def log(self, step: int, metrics: Metrics) -> None:
        for sink in self._sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """`metrics.jsonl`: one object a line, each with `step`. What a resumed run would write again is cut off."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= first_step else []
                except (ValueError, KeyError):
                    continue  # the torn last line of a run that was killed
        whole = path.with_name(f".{path.name}.part")
        whole.write_text("".join(line + "\n" for line in kept))
        whole.rename(path)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def log(self, step: int, metrics: Metrics) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._unwritten += (json.dumps({"step": step, **finite}) + "\n").encode()
        with suppress(OSError):  # a full disk: what it does not take goes with the next line
            self._write()

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        self._write()
        self._file.close()


class Wandb:
    """Weights & Biases: offline in the run's folder unless a key is set. Lists become histograms."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        online = "WANDB_API_KEY" in os.environ and os.environ.get("WANDB_MODE") != "offline"
        self._run = wandb.init(
            project=config.track.project,
            name=config.run.name,
            dir=folder,
            config=config.model_dump(mode="json"),
            mode="online" if online else "offline",
            settings=wandb.Settings(silent=not online, console="off", x_disable_stats=True),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        import numpy as np
        import wandb

        def shown(value: Any) -> Any:
            if not isinstance(value, list):
                return value
            return wandb.Histogram(np_histogram=(np.array(value, dtype=float), np.arange(len(value) + 1)))

        self._run.log({"step": step, **{name: shown(value) for name, value in metrics.items()}})

    def close(self) -> None:
        self._run.finish()


class Bar:
    """A progress bar with what matters; plain lines, some twenty in all, where the output is no terminal."""

    def __init__(self, first_step: int, steps: int) -> None:
        self._every = max(1, steps // 20)
        self._steps = steps
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=first_step, line="")
        self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        if "train/lm_loss" not in metrics:
            return
        line = (
            f"loss {metrics['train/lm_loss']:.3f} · {metrics['perf/tokens_per_second']:,.0f} tokens/s · imbalance "
            f"{metrics['balance/imbalance_home']:.2f} → {metrics['balance/imbalance_planned']:.2f}"
        )
        self._progress.update(self._task, completed=step, line=line)
        if self._progress.disable and (step % self._every == 0 or step in (1, self._steps)):
            console.print(f"step {step:>5}/{self._steps} · {line}")

    def close(self) -> None:
        self._progress.stop()

"""Everything that a run keeps of itself: metrics to all sinks, load trace, specialisation, alerts, profiler window.

Every rank has a recorder and calls it at the same steps; rank 0 writes.
"""

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from moetrain.common.console import console
from moetrain.config import RunSpec
from moetrain.distributed.mesh import Mesh
from moetrain.models.base import LanguageModel
from moetrain.moe.planning.cost import default_costs
from moetrain.observe.collect import specialization
from moetrain.observe.collect.alerts import Alerts
from moetrain.observe.collect.congestion import Phase
from moetrain.observe.collect.meter import Meter, StepRecord
from moetrain.observe.collect.profiler import Profiler
from moetrain.observe.collect.trace import LoadTrace
from moetrain.observe.metrics import GAMMA_EFF, GAMMA_PHASE, RECORD_SECONDS
from moetrain.observe.scores import HeldOut
from moetrain.observe.sinks.files import JsonLines, TensorBoard
from moetrain.observe.sinks.terminal import Plain, View
from moetrain.observe.sinks.tracker import Sink, Tolerant, Tracker
from moetrain.observe.sinks.wandb import Wandb


class Recorder:
    """Of one run, from the step after `first` on. Its context ends the recording, whatever happened."""

    def __init__(
        self,
        config: RunSpec,
        mesh: Mesh,
        folder: Path,
        first: int,
        domains: Sequence[str],
        model: LanguageModel,
    ) -> None:
        """`model` as it is about to be trained: its layers know the costs and limits that are planned with."""
        track, mine = config.track, folder if mesh.is_main else None
        self._config, self._folder, self._domains, self._routers = config, mine, domains, model.routers
        layer = model.layers_of_experts[0]
        costs = layer.costs or default_costs()
        self._meter = Meter(config, mesh, domains, costs)
        self._tracker = Tracker(sinks(config, folder, first) if mesh.is_main else [])
        trace = None if mine is None else mine / "load_trace"
        names, limits = config.model.pass_names, layer.experts.limits
        self._trace = LoadTrace(trace, track.trace_every, first, names, mesh.ep.size, limits, costs.lends)
        self._profiler = Profiler(None if mine is None else mine / "profile", track)
        self._alerts = Alerts(track.alert_imbalance, track.window, first)
        self._phase = Phase()
        self._spent = 0.0  # seconds on recording since the last row
        if mine is not None:
            specialization.forget(mine, first)

    def begin(self, step: int) -> None:
        self._profiler.before(step)
        self._meter.begin()

    def read(self, step: int, done: StepRecord, always: bool = False) -> dict[str, Any]:
        """Return the metrics of a step that gets a row, which are the caller's to complete; else none.

        May enter a collective. A row is written every `train.log_every` steps, and where it is to be `always`.
        """
        self._profiler.after(step)
        began = time.perf_counter()
        self._meter.add(done)
        row = always or step % self._config.train.log_every == 0
        sampled = self._trace.takes(step)
        metrics: dict[str, Any] = {}
        if row or sampled:
            reading = self._meter.read(done, self._routers)
            metrics = reading.metrics
            if sampled:
                metrics |= self._trace.record(step, done.parts[0].stats, reading)
        self._spent += time.perf_counter() - began
        return metrics if row else {}

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Log a row."""
        began, spent, self._spent = time.perf_counter(), self._spent, 0.0
        phase = self._phase.update(metrics[GAMMA_EFF])
        metrics |= {GAMMA_PHASE: float("nan") if phase is None else phase, RECORD_SECONDS: spent}
        self._tracker.log(step, metrics)
        for alert in self._alerts.check(step, metrics):
            self._tracker.alert(step, alert)
        self._spent = time.perf_counter() - began

    def held_out(self, step: int, found: HeldOut) -> None:
        self._tracker.log(step, found.metrics)
        if self._folder is not None:
            specialization.write(self._folder, step, self._domains, found.specialisation)

    def flush(self) -> None:
        """Write what is not on disk yet."""
        self._trace.flush()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._profiler.close()
        self._trace.flush()
        self._tracker.__exit__(kind, error, at)


def sinks(config: RunSpec, folder: Path, first: int) -> list[Sink]:
    """Return what the main rank reports to."""
    live = console.is_terminal and not console.quiet
    out: list[Sink] = [JsonLines(folder, first)]
    out.append(View(first, config.train.steps) if live else Plain(config.train.steps))
    if config.track.wandb and importlib.util.find_spec("wandb") is None:
        console.print("wandb is not installed: nothing goes there; track.wandb=false leaves this line out")
    elif config.track.wandb:
        out.append(Tolerant("wandb", lambda: Wandb(config, folder)))
    if config.track.tensorboard:
        out.append(Tolerant("TensorBoard", lambda: TensorBoard(folder, first)))
    return out

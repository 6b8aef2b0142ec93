"""TensorBoard: event files in the run's `tensorboard/`; `pip install moetrain[tensorboard]`."""

import math
from pathlib import Path

from moetrain.common import disk
from moetrain.observe.collect.alerts import Alert
from moetrain.observe.sinks.tracker import Metrics


class TensorBoard:
    """Numbers become scalars, lists histograms: a bar for every expert or rank."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(disk.make_own(folder / "tensorboard")), purge_step=first_step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if isinstance(value, list):
                self._histogram(name, value, step)
            elif value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def _histogram(self, name: str, values: list[float], step: int) -> None:
        limits = list(range(1, len(values) + 1))
        total, squares = (sum(v * n**power for v, n in zip(values, limits, strict=True)) for power in (1, 2))
        self._writer.add_histogram_raw(name, 0, len(values), sum(values), total, squares, limits, values, step)

    def alert(self, step: int, alert: Alert) -> None:
        self._writer.add_text(f"alerts/{alert.kind}", alert.text, step)

    def close(self) -> None:
        self._writer.close()

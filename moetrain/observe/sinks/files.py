"""Metrics and alerts in files of a run's folder: JSON lines, and TensorBoard's events."""

import json
import math
from contextlib import suppress
from pathlib import Path

from moetrain.common import disk
from moetrain.common.console import errors
from moetrain.observe.collect.alerts import Alert
from moetrain.observe.sinks.tracker import Metrics


class JsonLines:
    """`metrics.jsonl` and `alerts.jsonl`: one object a line, each with `step`.

    What a resumed run would write again is cut off.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._metrics = _Lines(folder / "metrics.jsonl", first_step)
        self._alerts = _Lines(folder / "alerts.jsonl", first_step)

    def log(self, step: int, metrics: Metrics) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._metrics.append({"step": step, **finite})

    def alert(self, step: int, alert: Alert) -> None:
        self._alerts.append({"step": step, **alert._asdict()})

    def close(self) -> None:
        self._metrics.close()
        self._alerts.close()


class _Lines:
    def __init__(self, path: Path, first_step: int) -> None:
        kept = [json.dumps(row) + "\n" for row in disk.rows(path) if row["step"] <= first_step]
        whole = "".join(kept).encode()
        if not path.is_file() or path.is_symlink() or path.read_bytes() != whole:
            disk.write(path, whole)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._said_so = False

    def append(self, row: Metrics) -> None:
        """Write the row; what a disk that is full or read-only does not take goes with the next one."""
        self._unwritten += (json.dumps(row) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if not self._said_so:
                errors.print(f"{self._file.name} cannot be written ({error.strerror}): its lines wait until it can")
            self._said_so = True

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        with suppress(OSError):
            self._write()
        self._file.close()


class TensorBoard:
    """Event files in the run's `tensorboard/`; `pip install moetrain[tensorboard]`.

    Numbers become scalars, lists histograms: a bar for every expert or rank.
    """

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

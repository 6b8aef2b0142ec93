"""`metrics.jsonl` and `alerts.jsonl` of a run's folder."""

import json
import math
from contextlib import suppress
from pathlib import Path

from moetrain.common import disk
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

    def append(self, row: Metrics) -> None:
        self._unwritten += (json.dumps(row) + "\n").encode()
        with suppress(OSError):  # a full disk: what it does not take goes with the next line
            self._write()

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        with suppress(OSError):
            self._write()
        self._file.close()

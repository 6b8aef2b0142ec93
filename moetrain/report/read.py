"""A run's folder as a report needs it: whatever is there can be read, and what is missing is said in words.

Old runs lack fields, killed runs have torn lines, some never wrote a trace: none of that is an error here.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.common import disk
from moetrain.common.arrays import BROKEN, read_arrays
from moetrain.config import ConfigError
from moetrain.observe.metrics import LM_LOSS, LOSS

Row = dict[str, Any]
PARSED_BYTES = 64 << 20  # of metrics.jsonl, about, that are parsed: of a longer file every nth training row is
READ_BYTES = 1 << 30  # of it that are read at all: of a longer file the end
LINE_BYTES = 16 << 20  # of a line: a longer one is unreadable
TRAINING_ROW = f'"{LM_LOSS}"'.encode()
TRACE = ("step", "layers", "counts", "owner", "placed", "traffic", "home", "planned", "waited")  # what figures use


@dataclass
class Metrics:
    """`metrics.jsonl`. `take` reads on where the last call stopped: the run may still be writing."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    torn: int = 0  # lines that are no JSON object with a step
    every: int = 1  # training rows of which one is kept
    begin: int = 0  # byte from which on the file is read
    _lines: int = 0  # training rows that were met
    _skipped: bytes = b""  # the last of them, where it was not kept
    _offset: int = 0
    _known: dict[str, Any] = field(default_factory=dict)  # columns that were asked for since the last line came

    def take(self) -> bool:
        """Read the complete lines that are new. Returns whether anything changed."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        anew = size < self._offset  # a run that resumed wrote the file again
        if anew:
            self.rows, self.torn, self._offset, self._lines = [], 0, 0, 0
        if size == self._offset:
            return anew
        self._known, before = {}, self._offset
        if not self._offset:  # the first time: how much of it
            self.begin = self._offset = max(0, size - READ_BYTES)
            self.every = -(-(size - self.begin) // PARSED_BYTES)
        with self.path.open("rb", buffering=1 << 20) as file:
            file.seek(self._offset)
            if self._offset and self._offset == self.begin:
                self._offset += len(file.readline(LINE_BYTES))  # the rest of a line whose beginning is left out
            while self._offset < size and (line := file.readline(LINE_BYTES)):
                if not line.endswith(b"\n") and len(line) < LINE_BYTES:
                    break  # still being written
                self._offset += len(line)
                if line.endswith(b"\n"):
                    self._add(line)
                else:
                    self.torn += 1
        if self._skipped:  # the newest row is there in any case
            self._keep(self._skipped)
            self._skipped = b""
        return anew or self._offset > before

    @property
    def cut(self) -> bool:
        """Tell whether the file ends in the middle of a line."""
        return self.path.is_file() and self.path.stat().st_size > self._offset

    @property
    def left_out(self) -> str:
        """Say which rows of a long file are not here, in words; empty where all are."""
        parts = [f"all but its last {READ_BYTES >> 30} GiB"] if self.begin else []
        if self.every > 1:
            parts.append(f"of every {self.every} training rows all but one, to parse {PARSED_BYTES >> 20} MiB")
        return " and ".join(parts)

    def _add(self, line: bytes) -> None:
        if self.every > 1 and TRAINING_ROW in line:
            self._lines += 1
            self._skipped = line if self._lines % self.every else b""
            if self._skipped:
                return
        self._keep(line)

    def _keep(self, line: bytes) -> None:
        row = disk.row_of(line)
        if row is None:
            self.torn += 1
            return
        self.rows.append({k: _array(v) if isinstance(v, list) else v for k, v in row.items()})

    @property
    def training(self) -> list[Row]:
        return self._once("training", lambda: [r for r in self.rows if LM_LOSS in r or LOSS in r])

    @property
    def names(self) -> list[str]:
        """Return every metric's name, in the order of their first appearance."""
        return self._once("names", lambda: [n for n in dict.fromkeys(n for r in self.rows for n in r) if n != "step"])

    def numbers(self, name: str, rows: Iterable[Row] | None = None) -> np.ndarray:
        """Return float64 [rows]; NaN where a row lacks it or it was no finite number. Default: the training rows."""
        return np.array([_number(row.get(name)) for row in (self.training if rows is None else rows)], dtype=float)

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps [n], values [n, width]) of the rows that have the list, at its most frequent width."""
        return self._once(f"list {name}", lambda: self._lists(name))

    def _once(self, what: str, find: Callable[[], Any]) -> Any:
        if what not in self._known:
            self._known[what] = find()
        return self._known[what]

    def _lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        found = [(row["step"], row[name]) for row in self.rows if isinstance(row.get(name), np.ndarray)]
        if not found:
            return np.zeros(0, int), np.zeros((0, 0))
        (width, _), *_ = Counter(len(values) for _, values in found).most_common(1)
        found = [(step, values) for step, values in found if len(values) == width]
        return np.array([step for step, _ in found]), np.stack([values for _, values in found]).astype(float)

    def last(self, name: str) -> float:
        """Return the last finite value, or NaN."""
        return next((x for row in reversed(self.rows) if not np.isnan(x := _number(row.get(name)))), float("nan"))


class RunData:
    """One run's folder, as it was at the last `refresh`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.metrics = Metrics(folder / "metrics.jsonl")
        self.refresh()

    def refresh(self) -> bool:
        """Bring the run up to date. Returns whether the metrics grew."""
        new = self.metrics.take()
        self.missing: list[str] = []
        if not self.metrics.path.is_file():
            self.missing.append("metrics.jsonl is not there: no curves")
        elif not self.metrics.rows:
            self.missing.append("metrics.jsonl has no complete line yet: no curves")
        if self.metrics.cut:
            self.missing.append("the last line of metrics.jsonl is cut off: left out")
        if self.metrics.left_out:
            self.missing.append(f"metrics.jsonl is long, left out: {self.metrics.left_out}")
        if self.metrics.torn:
            self.missing.append(f"metrics.jsonl: {self.metrics.torn} unreadable line(s) left out")
        self.config = self._mapping("config.yaml", "not there")
        self.summary = self._mapping("summary.json", "not there: the run has not ended")
        self.prediction = disk.read_json(self.folder / "prediction.json")
        self.starts = disk.rows(self.folder / "starts.jsonl")
        self.trace = self._trace()
        self.specialisation = self._specialisation()
        self.alerts = self._alerts()
        return new

    def option(self, path: str, default: Any = None) -> Any:
        """Return a field of the config, as `model.dim`."""
        found = _field(self.config, *path.split("."))
        return default if found is None else found

    @property
    def resumed(self) -> list[int]:
        """Return the steps after which the run was started again and went on."""
        return sorted({row["step"] for row in self.starts[1:]} - {0})

    def whole(self, path: str) -> int | None:
        """Return a field of the config that is a whole number; None where it is none."""
        found = self.option(path)
        return found if isinstance(found, int) else None

    def ended(self, *path: str) -> float:
        """Return a number of the summary; NaN where it is none."""
        return _number(_field(self.summary, *path))

    def predicted(self, name: str) -> float:
        """Return a number of the prediction that was made before the first step; NaN where there is none."""
        return _number(_field(self.prediction, name))

    def _mapping(self, name: str, without: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            text = disk.read(path)
            found = disk.parsed_yaml(text) if path.suffix == ".yaml" else json.loads(text)
        except FileNotFoundError:
            self.missing.append(f"{name} is {without}")
            return {}
        except disk.BROKEN as error:
            self.missing.append(f"{name} cannot be read ({type(error).__name__})")
            return {}
        if isinstance(found, dict):
            return found
        self.missing.append(f"{name} does not hold fields")
        return {}

    def _trace(self) -> dict[str, np.ndarray]:
        """The load trace, arrays over samples but for `layers`; {} where there is none. Names that a part lacks go."""
        parts: list[dict[str, np.ndarray]] = []
        for path in sorted((self.folder / "load_trace").glob("part_*.npz")):
            try:
                part = read_arrays(path, TRACE)
                count = len(part["step"])
            except BROKEN as error:
                self.missing.append(f"load_trace/{path.name} cannot be read ({type(error).__name__})")
                continue
            if count and all(parts[0].get(k, v).ndim == v.ndim for k, v in part.items() if parts):
                parts.append(part)
        if not parts:
            off = self.option("track.trace_every") == 0
            self.missing.append("there is no load trace: track.trace_every=0" if off else "the load trace is empty")
            return {}
        common = set.intersection(*({*part} for part in parts))
        found = {name: _joined([part[name] for part in parts]) for name in common}
        order = np.argsort(found["step"], kind="stable")
        return {name: array if array.dtype.kind == "U" else array[order] for name, array in found.items()}

    def _specialisation(self) -> dict[str, Any]:
        """The newest evaluation's experts × domains; {} where there is none."""
        paths = (self.folder / "specialisation").glob("step_*.json")
        for path in sorted(paths, key=lambda p: (len(p.name), p.name), reverse=True):
            try:
                found = json.loads(disk.read(path))
                if len(found["domains"]) and len(found["layers"][0]["counts"]):
                    return found
            except disk.BROKEN as error:
                self.missing.append(f"specialisation/{path.name} cannot be read ({type(error).__name__})")
        return {}

    def _alerts(self) -> list[Row]:
        path = self.folder / "alerts.jsonl"
        found: list[Row] = []
        try:
            text = disk.read(path)
        except FileNotFoundError:
            return found
        except (OSError, ValueError) as error:
            self.missing.append(f"alerts.jsonl cannot be read ({type(error).__name__})")
            return found
        for line in text.splitlines():
            try:
                alert = json.loads(line)
                found.append({"step": int(alert["step"]), "kind": str(alert["kind"]), "text": str(alert["text"])})
            except disk.BROKEN:
                self.missing.append("alerts.jsonl has an unreadable line: left out")
        return found


def open_run(name: str, directory: str = "runs") -> RunData:
    """Open a run by its folder or its name in `directory`. Raises `ConfigError` where there is nothing to report on."""
    for folder in (Path(name), Path(directory) / name):
        if folder.is_dir() and any((folder / part).exists() for part in ("metrics.jsonl", "config.yaml", "load_trace")):
            return RunData(folder)
    raise ConfigError(f"run={name}: must be a run's folder, or the name of one in {directory}")


def _field(tree: Any, *path: str) -> Any:
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Along the first axis; zeros behind the axes of the smaller ones. Names, the same in every part, once."""
    if arrays[0].dtype.kind == "U":
        return max(arrays, key=len)
    shape = np.max([a.shape[1:] for a in arrays], axis=0, initial=0)
    padded = [
        np.pad(a, [(0, 0), *((0, int(want - have)) for want, have in zip(shape, a.shape[1:], strict=True))])
        for a in arrays
    ]
    return np.concatenate(padded)


def _array(values: list[Any]) -> Any:
    """float32, NaN for null; a list of something else as it is."""
    try:
        return np.array(values, np.float32)
    except (TypeError, ValueError):
        return values


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else float("nan")

"""The load trace: which source rank chose which expert, layer by layer, at sampled steps. `numpy` opens it.

`load_trace/part_NNNNN.npz` has `step` [n], `counts` [n, L, R, E] (rows of each source rank for each expert, first
micro-step, the expert group of rank 0; zeros behind the experts of a layer that has fewer), and `home` and `planned`
[n, L, R] (rows of each rank's own experts, and rows computed on each rank). L counts passes through MoE layers. Parts
are flushed as the run goes; each appears whole.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.moe.layer import LayerStats

PART = 20  # samples
FIELDS = ("counts", "home", "planned")


class LoadTrace:
    """Collects samples into parts. `every` = 0 records nothing."""

    def __init__(self, folder: Path, every: int, first_step: int) -> None:
        self._folder, self._every = folder, every
        self._samples: list[tuple[Any, ...]] = []  # step, then FIELDS
        if every:
            folder.mkdir(exist_ok=True)
            for part in folder.glob("part_*.npz"):  # without what a resumed run will write again
                with np.load(part) as old:
                    samples = list(zip(old["step"].tolist(), *(old[name] for name in FIELDS), strict=True))
                kept = [sample for sample in samples if sample[0] <= first_step]
                if len(kept) < len(samples):
                    part.unlink()
                    self._samples += kept
            self._next = 1 + max((int(p.stem.split("_")[1]) for p in folder.glob("part_*.npz")), default=-1)

    def record(self, step: int, stats: Sequence[LayerStats]) -> None:
        if self._every and (step % self._every == 0 or step == 1):
            most = max(s.plan.counts.shape[1] for s in stats)
            counts = [np.pad(s.plan.counts, ((0, 0), (0, most - s.plan.counts.shape[1]))) for s in stats]
            home, planned = [s.plan.home_loads() for s in stats], [s.plan.loads() for s in stats]
            self._samples.append((step, *(np.stack(x).astype(np.int32) for x in (counts, home, planned))))
            if len(self._samples) >= PART:
                self.flush()

    def flush(self) -> None:
        if not self._samples:
            return
        steps, *arrays = zip(*self._samples, strict=True)
        path = self._folder / f"part_{self._next:05d}.npz"
        unfinished = self._folder / f".{path.name}"
        found: dict[str, Any] = {name: np.stack(array) for name, array in zip(FIELDS, arrays, strict=True)}
        try:
            with unfinished.open("wb") as out:
                np.savez_compressed(out, step=np.array(steps), **found)
        except OSError:  # a full disk: the samples wait for the next flush
            unfinished.unlink(missing_ok=True)
            return
        os.rename(unfinished, path)
        self._next += 1
        self._samples = []


def read(folder: Path) -> dict[str, np.ndarray]:
    """All parts of a run's trace, in order of step; empty arrays where there is none."""
    parts = [np.load(p) for p in sorted((folder / "load_trace").glob("part_*.npz"))]
    if not parts:
        return {
            "step": np.zeros(0, int),
            "counts": np.zeros((0, 0, 0, 0), int),
            "home": np.zeros((0, 0, 0), int),
            "planned": np.zeros((0, 0, 0), int),
        }
    return {name: np.concatenate([p[name] for p in parts]) for name in ("step", *FIELDS)}

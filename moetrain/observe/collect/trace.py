"""The load trace: which source rank chose which expert, layer by layer, at sampled steps; what the plan made of it; who
took how long, and who waited for whom. `numpy` opens it; docs/metrics.md has every array.

`load_trace/part_NNNNN.npz` holds some samples. Parts are flushed as the run goes; each appears whole.

n samples, L passes through MoE layers, R ranks of the expert group, E experts, A with those that compute nothing, W
ranks of the world, P phases.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.common import disk
from moetrain.common.arrays import BROKEN, Array, read_arrays, stack
from moetrain.moe.layer import LayerStats
from moetrain.moe.planning.cost import Limits
from moetrain.moe.planning.plan import Plan
from moetrain.observe.collect.meter import ALL_PHASES, Reading, waited
from moetrain.observe.metrics import WAITED, WAITED_FOR

PART = 20  # samples
SHAPES = {  # of one sample; the first few letters of an empty trace's axes are zero
    "counts": "LRE",
    "owner": "LE",
    "placed": "LRE",
    "traffic": "LRR",
    "home": "LR",
    "planned": "LR",
    "selected": "LA",
    "quality": "LA",
    "seconds": "WP",
    "waited": "WW",
    "memory": "W",
}
NAMES = {"layers": "L", "phases": "P", "limits": "2", "lends": "1"}  # once a part
NO_LIMIT = -1
FILL = {"owner": -1}  # where a layer has fewer experts than another; zero in the other arrays


class LoadTrace:
    """Collects samples into parts. `every` = 0 records nothing; so does a rank that does not write (no `folder`)."""

    def __init__(
        self,
        folder: Path | None,
        every: int,
        first_step: int,
        layers: Sequence[str],
        ep: int,
        limits: Limits,
        lends: int = 1,
    ) -> None:
        """`limits` and `lends`: what the planner knew besides the machine's costs (`moe/cost.py`)."""
        self._folder, self._every, self._ep = folder, every, ep
        known = [NO_LIMIT if n is None else n for n in (limits.rows, limits.guests)]
        self._once = {
            "layers": np.array(layers),
            "phases": np.array(ALL_PHASES),
            "limits": np.array(known),
            "lends": np.array([lends]),
        }
        self._samples: list[dict[str, Any]] = []
        if every and folder is not None:
            folder.mkdir(exist_ok=True)
            for path in folder.glob("part_*.npz"):  # without what a resumed run will write again
                part = _open(path)
                kept = None if part is None else part["step"] <= first_step
                if part is None or kept is None or not kept.any():
                    path.unlink()
                elif not kept.all():
                    _write(path, {name: part[name] if name in NAMES else part[name][kept] for name in part})
            self._next = 1 + max((int(p.stem.split("_")[1]) for p in folder.glob("part_*.npz")), default=-1)

    def takes(self, step: int) -> bool:
        return bool(self._every) and (step % self._every == 0 or step == 1)

    def record(self, step: int, stats: Sequence[LayerStats], reading: Reading) -> dict[str, list[float]]:
        """Record a sample of a step that `takes`: `stats` of its first micro-step. Returns the metrics that come with
        it."""
        waited_WW = waited(reading.waits, self._ep)
        if self._folder is not None:
            plans = [s.plan for s in stats]
            sample = {
                "counts": stack([s.plan.counts[:, : s.num_experts] for s in stats]),
                "owner": stack([s.plan.home[: s.num_experts] for s in stats], -1).astype(np.int16),
                "placed": stack([_place_experts(s.plan, s.slices) for s in stats]),
                "traffic": stack([p.traffic for p in plans]),
                "home": stack([p.home_loads() for p in plans]),
                "planned": stack([p.loads() for p in plans]),
                "selected": stack(reading.selected).astype(np.int64),
                "quality": stack(reading.quality).astype(np.float32),
                "seconds": reading.seconds.astype(np.float32),
                "waited": waited_WW.astype(np.float32),
                "memory": reading.memory.astype(np.float32),
            }
            shrunk = {
                k: v.astype(np.int32) if v.dtype == np.int64 and k != "selected" else v for k, v in sample.items()
            }
            self._samples.append({"step": step, **shrunk})
            if len(self._samples) >= PART:
                self.flush()
        return {WAITED: waited_WW.sum(1).tolist(), WAITED_FOR: waited_WW.sum(0).tolist()}

    def flush(self) -> None:
        if self._folder is None or not self._samples:
            return
        found = {name: np.stack([np.asarray(s[name]) for s in self._samples]) for name in ("step", *SHAPES)}
        if _write(self._folder / f"part_{self._next:05d}.npz", found | self._once):
            self._next += 1
            self._samples = []


def read(folder: Path) -> dict[str, Array]:
    """Return all parts of a run's trace that can be read, in order of step; empty arrays where there is none.

    Where parts differ in size (a run resumed on other ranks), the smaller ones are padded, with `FILL` or zeros.
    """
    parts = list(read_parts(folder))
    if not parts:
        empty = {name: np.zeros((0,) * (1 + len(axes)), int) for name, axes in SHAPES.items()}
        return {"step": np.zeros(0, int), **empty, **{name: np.zeros(0, "<U1") for name in NAMES}}
    found = {}
    for name in ("step", *SHAPES):
        samples = [sample for part in parts for sample in part[name]]
        found[name] = stack(samples, FILL.get(name, 0))
    order = np.argsort(found["step"], kind="stable")
    return {**{name: array[order] for name, array in found.items()}, **{name: parts[-1][name] for name in NAMES}}


def read_parts(folder: Path) -> Iterator[dict[str, Array]]:
    """Return the parts of a run's trace that can be read, as they are."""
    for path in sorted((folder / "load_trace").glob("part_*.npz")):
        if (part := _open(path)) is not None:
            yield part


def _write(path: Path, arrays: dict[str, Any]) -> bool:
    """Whole or not at all; False on a full disk: the samples wait for the next time."""
    try:
        with disk.replacing(path) as out:
            np.savez_compressed(out, **arrays)
    except OSError:
        return False
    return True


def _open(path: Path) -> dict[str, Array] | None:
    """The arrays of a part; None where it is damaged or lacks some of them."""
    try:
        names = ("step", *SHAPES, *NAMES)
        found = read_arrays(path, names)
        return found if len(found) == len(names) else None
    except BROKEN:
        return None


def _place_experts(plan: Plan, slices: int) -> Array:
    """Return [R, E] rows of each expert that each rank computes; of slices, as many whole ones, rounded up."""
    placed = plan.placed()
    return placed if slices == 1 else -(-placed.reshape(len(placed), slices, -1).sum(1) // slices)

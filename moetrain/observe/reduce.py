"""Long series made short enough to draw, and arrays packed for the page."""

import base64
import math
from typing import Any

import numpy as np

MOST_POINTS = 320  # of a curve: what a figure's width can show
BESIDE = 2  # rows on either side that a smoothed line and its band take in
MOST_CELLS = 1_500_000  # of a heat map over time
DEAD, ABSENT = 0, 255  # codes of a packed load


def edges(count: int, most: int) -> np.ndarray:
    """Return where each of at most `most` buckets of `count` consecutive rows begins."""
    return np.unique(np.linspace(0, count, min(count, most), endpoint=False).astype(int))


def means(values: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """Return [buckets, ...]: the mean of each bucket's finite values; NaN where it has none."""
    if not len(values):
        return values
    finite = np.isfinite(values)
    total = np.add.reduceat(np.where(finite, values, 0.0), begin, axis=0)
    count = np.add.reduceat(finite.astype(float), begin, axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def extremes(values: np.ndarray, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and largest finite value of each bucket and the rows beside it: no peak is lost by drawing fewer
    points."""
    ends = [*begin[1:], len(values)]
    parts = [values[max(0, first - BESIDE) : end + BESIDE] for first, end in zip(begin, ends, strict=True)]
    finite = [part[np.isfinite(part)] for part in parts]
    low, high = ([find(part) if len(part) else np.nan for part in finite] for find in (np.min, np.max))
    return np.array(low), np.array(high)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean of each value and up to `BESIDE` rows on either side, as many there as here: it does not lag, and
    the first and the last value stay what they are. Between them what is missing is interpolated."""
    known = np.flatnonzero(np.isfinite(values))
    out = np.full(len(values), np.nan)
    if len(known):
        first, last = int(known[0]), int(known[-1])
        filled = np.interp(np.arange(len(values)), known, values[known])
        for at in range(first, last + 1):
            beside = min(BESIDE, at - first, last - at)
            out[at] = filled[at - beside : at + beside + 1].mean()
    return out


def smooth_means(values: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """Return [buckets]: the same as `smooth`, with the last value of all as the last."""
    line = means(smooth(values), begin)
    line[-1] = smooth(values)[-1]
    return line


def plain(values: np.ndarray) -> list[Any]:
    """Return numbers for JSON: five significant digits, None for what is no number."""
    if values.ndim > 1:
        return [plain(row) for row in values]
    return [float(f"{x:.5g}") if math.isfinite(x) else None for x in values.tolist()]


def pack_load(relative: np.ndarray) -> str:
    """Pack loads in mean loads, on a log scale: code 127 is the mean, 16 steps a doubling. 0 nothing at all, 255
    absent."""
    with np.errstate(divide="ignore", invalid="ignore"):
        code = np.clip(np.round(127 + 16 * np.log2(relative)), 1, 254)
    code = np.where(relative > 0, code, DEAD)
    return _base64(np.where(np.isfinite(relative), code, ABSENT).astype(np.uint8))


def pack_thousandths(values: np.ndarray) -> str:
    """Pack as little-endian uint16, a thousandth the unit: up to 65.5."""
    return _base64(np.clip(np.round(1000 * values), 0, 65535).astype("<u2"))


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()

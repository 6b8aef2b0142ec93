"""Arrays of what is recorded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def stack(arrays: Sequence[Any], fill: int = 0) -> Array:
    """One array of them all, each padded with `fill` to the largest, at the end of every axis."""
    arrays = [np.asarray(a) for a in arrays]
    shape = tuple(max(sizes) for sizes in zip(*(a.shape for a in arrays), strict=True))
    if all(a.shape == shape for a in arrays):
        return np.stack(arrays)
    pads = [[(0, n - m) for n, m in zip(shape, a.shape, strict=True)] for a in arrays]
    return np.stack([np.pad(a, pad, constant_values=fill) for a, pad in zip(arrays, pads, strict=True)])

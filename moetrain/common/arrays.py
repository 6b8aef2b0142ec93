"""Arrays of what is recorded: read from files that may be damaged, and stacked."""

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.common import disk

Array = NDArray[Any]
MOST_BYTES = 1 << 31  # of the arrays of a file
BROKEN = (
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    *disk.BROKEN,
)  # what a damaged file raises


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """The arrays of these names in an npz file, no pickles among them; those that it lacks are left out.

    Raises one of `BROKEN` where it is damaged, or its arrays take more than `MOST_BYTES`.
    """
    found, left = {}, MOST_BYTES
    with disk.opened(path, MOST_BYTES) as raw, zipfile.ZipFile(raw) as archive:
        there = {*archive.namelist()}
        for name in names:
            if (member := f"{name}.npy") not in there:
                continue
            left -= archive.getinfo(member).file_size
            if left < 0:
                raise ValueError(f"its arrays have more than {MOST_BYTES:,} bytes")
            found[name] = np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
    return found


def stack(arrays: Sequence[Any], fill: int = 0) -> Array:
    """One array of them all, each padded with `fill` to the largest, at the end of every axis."""
    arrays = [np.asarray(a) for a in arrays]
    shape = tuple(max(sizes) for sizes in zip(*(a.shape for a in arrays), strict=True))
    if all(a.shape == shape for a in arrays):
        return np.stack(arrays)
    pads = [[(0, n - m) for n, m in zip(shape, a.shape, strict=True)] for a in arrays]
    return np.stack([np.pad(a, pad, constant_values=fill) for a, pad in zip(arrays, pads, strict=True)])

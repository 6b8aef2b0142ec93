"""Bags of rows: which rows are summed together, and small helpers that never wait for a GPU.

M rows, B bags.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STAGED_BYTES = 64 << 10  # CUDA copies as much from memory that is not pinned without a wait


@dataclass(frozen=True)
class Bags:
    """Says which rows belong to which of B bags: `row_M[begin_B[b] : begin_B[b + 1]]`, in their order."""

    row_M: Tensor  # int64, row numbers sorted by bag
    begin_B: Tensor  # int64 [B + 1]
    most: int  # no bag has more rows

    @classmethod
    def group(cls, bag_M: Tensor, num_bags: int, most: int) -> "Bags":
        """Group rows by `bag_M`, int32 or int64: the number of each row's bag.

        Rows of the bag `num_bags` belong to none.
        """
        sorted_M, row_M = bag_M.sort(stable=True)
        begin_B = torch.searchsorted(sorted_M, torch.arange(num_bags + 1, dtype=bag_M.dtype, device=bag_M.device))
        return cls(row_M, begin_B, most)

    def select(self, bags: slice) -> "Bags":
        """Return some of the bags, one after another."""
        begin, end, _ = bags.indices(len(self.begin_B) - 1)
        return Bags(self.row_M, self.begin_B[begin : end + 1], self.most)


def sort_stably(key_M: Tensor) -> Tensor:
    """Return the int64 index that sorts the keys; equal ones stay in their order."""
    return key_M.argsort(stable=True)


def find_true(mask: Tensor, count: int) -> Tensor:
    """Return [count] int64 where a flat mask is true, when it is known how often: no host sync."""
    return torch.nonzero_static(mask, size=count).view(-1)


def upload(values: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    """Return a copy on the device that the host does not wait for."""
    found = torch.from_numpy(values)
    if device.type == "cuda" and torch.cuda.is_available() and values.nbytes > STAGED_BYTES:
        found = found.pin_memory()
    return found.to(device, non_blocking=True)

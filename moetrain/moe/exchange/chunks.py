"""How rows are cut in chunks: which part each copy and each own token belongs to, and the index tables that follow.

The copies from and to each rank, and a rank's own tokens, are cut in K contiguous parts of nearly equal size. All rows
of a token on a rank are in the chunk of its copy there.

T tokens here, C copies sent, P pool: T own tokens, then the copies that arrived; M rows computed here, A of them real
and the others padding of weight zero, S slots here, R ranks, K chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.moe.kernels.bags import sort_stably, upload
from moetrain.moe.kernels.tables import Ints, Travel


def cut_evenly(copies: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Return [K][R] the size of each part of each rank's copies."""
    ends = np.arange(num_chunks + 1)[:, None] * np.array(copies, np.int64) // num_chunks
    return list(np.diff(ends, axis=0).tolist())


class ChunkedRows(NamedTuple):
    """The rows here, chunk by chunk, and slot by slot in each of them."""

    order_A: Tensor  # which real row comes next, of those that stand slot by slot
    row_A: Tensor  # where it stands among the M
    pool_M: Tensor  # which entry of the pool each row reads
    bag_M: Tensor  # which one it is summed for; one that is not there for padding
    weight_M: Tensor  # fp32
    chunk_rows: list[list[int]]  # [K][S], padding included
    slotwise_M: Tensor  # which row comes next slot by slot, padding at the end of a slot


@dataclass(frozen=True)
class ChunkCut:
    """The chunks of tokens, sent and received."""

    num_chunks: int
    order_C: Tensor  # which copy is sent next, of those that stand by rank
    place_C: Tensor  # when each of those is sent
    chunk_P: Tensor  # the chunk of each entry of the pool, by source
    place_P: Tensor  # where it stands by chunk, then source

    @classmethod
    def find(
        cls, num_chunks: int, num_tokens: int, copies_out: Sequence[int], copies_in: Sequence[int], device: torch.device
    ) -> "ChunkCut":
        """Cut T own tokens and [R] copies."""
        chunk_C = _number_parts(copies_out, num_chunks, device)
        order_C = sort_stably(chunk_C)
        chunk_P = _number_parts([num_tokens, *copies_in], num_chunks, device)
        own_T = torch.arange(num_tokens, device=device)
        place_P = torch.cat([own_T, _invert(sort_stably(chunk_P[num_tokens:])) + num_tokens])
        return cls(num_chunks, order_C, _invert(order_C), chunk_P, place_P)

    def cut_rows(self, pool_A: Tensor, weight_A: Tensor, travel: Travel) -> ChunkedRows:
        """Return the rows in chunks; waits for the device, which counts them.

        pool_A: which entry of the pool each real row reads, slot by slot; weight_A fp32.
        """
        device, real_S, step = pool_A.device, travel.real_S, travel.row_step
        chunk_A, slot_A = self.chunk_P.index_select(0, pool_A), _repeat(np.arange(len(real_S)), real_S, device)
        order_A = sort_stably(chunk_A)
        pool_A = self.place_P.index_select(0, pool_A).index_select(0, order_A)
        weight_A = weight_A.index_select(0, order_A)
        counts = chunk_A.new_zeros(self.num_chunks * len(real_S))
        counts.scatter_add_(0, chunk_A * len(real_S) + slot_A, torch.ones_like(chunk_A))
        real = np.array(counts.tolist(), np.int64)
        rows = -(-real // step) * step
        chunk_rows = rows.reshape(self.num_chunks, -1).tolist()
        row_A = torch.arange(len(pool_A), device=device)
        if rows.sum() == len(pool_A):
            return ChunkedRows(order_A, row_A, pool_A, pool_A, weight_A, chunk_rows, _invert(order_A))
        row_A = row_A + _repeat(np.cumsum(rows - real) - (rows - real), real, device)
        pool_M = pool_A.index_select(0, _repeat(np.cumsum(real) - real, rows, device))  # padding: a segment's first row
        pool_M[row_A] = pool_A
        bag_M = torch.full_like(pool_M, len(self.chunk_P))
        bag_M[row_A] = pool_A
        weight_M = weight_A.new_zeros(len(pool_M))
        weight_M[row_A] = weight_A
        slot_M = _repeat(np.tile(np.arange(len(real_S)), self.num_chunks), rows, device)
        before_M = torch.full_like(pool_M, len(pool_A))
        before_M[row_A] = order_A
        by_place_M = sort_stably(before_M)
        slotwise_M = by_place_M.index_select(0, sort_stably(slot_M.index_select(0, by_place_M)))
        return ChunkedRows(order_A, row_A, pool_M, bag_M, weight_M, chunk_rows, slotwise_M)


def _number_parts(copies: Sequence[int], num_chunks: int, device: torch.device) -> Tensor:
    """Return the chunk of each copy, where each rank's stand together."""
    sizes = np.array(cut_evenly(copies, num_chunks), np.int64)
    return _repeat(np.tile(np.arange(num_chunks), len(copies)), sizes.T.ravel(), device)


def _repeat(values: Ints, times: Ints, device: torch.device) -> Tensor:
    """Return each value so many times."""
    if device.type == "cpu":
        return torch.from_numpy(np.repeat(values, times))
    values_times = upload(np.stack([values, times]), device)
    return values_times[0].repeat_interleave(values_times[1], output_size=int(times.sum()))


def _invert(order: Tensor) -> Tensor:
    """Return the place of each element in an order."""
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))

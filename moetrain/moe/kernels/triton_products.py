"""The grouped products in Triton, for GPUs from Hopper on: results are written where they are wanted, at one rate
whether all segments are equally long or one of them has nearly all rows (torch's grouped product loses a third there).

A program computes one tile of the result. Blocks of the operands are fetched by tensor descriptors, in bf16 or fp16,
added up in fp32, in a fixed order. Importing this imports Triton.

M rows, A and B widths, S slots.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moetrain.moe.kernels.bags import upload
from moetrain.moe.kernels.reference import Matrices

TILE = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8}  # rows and columns of the result; what is added up at a time
LAUNCH = {"num_warps": 8, "num_stages": 4}
INTERPRETED = {"BM": 16, "BN": 32, "BK": 16, "GROUP": 2}  # on a CPU, in tests
DTYPES = (torch.bfloat16, torch.float16)
KNOWN_SIZES = 512  # tile tables that are kept: of the layers between a forward and its backward


@triton.jit
def _locate(tile, num_rows, num_columns, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the row and the column of tiles of a program: a few rows at a time, so that their operands are in L2."""
    width = GROUP * num_columns
    first = tile // width * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    return first + tile % width % size, tile % width // size


@triton.jit(do_not_specialize=["num_tiles"])
def _segment_mm(  # type: ignore[no-untyped-def]
    rows, weights, out, tiles, num_tiles, A, B,
    TRANSPOSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`tiles` [., 3]: the slot of rows that are multiplied together, the first of them, and the end of the segment."""
    m, n = _locate(tl.program_id(0), num_tiles, tl.cdiv(B, BN), GROUP)
    slot, begin, end = tl.load(tiles + 3 * m), tl.load(tiles + 3 * m + 1), tl.load(tiles + 3 * m + 2)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, A, BK):
        left = rows.load([begin, k])
        if TRANSPOSE:
            total = tl.dot(left, weights.load([slot, n * BN, k]).reshape(BN, BK).T, total, input_precision="ieee")
        else:
            total = tl.dot(left, weights.load([slot, k, n * BN]).reshape(BK, BN), total, input_precision="ieee")
    row, column = tl.arange(0, BM), n * BN + tl.arange(0, BN)
    at = out + begin.to(tl.int64) * B + (row[:, None] * B + column[None, :])
    inside = (begin + row < end)[:, None] & (column < B)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _segment_outer(  # type: ignore[no-untyped-def]
    left, right, slots, like, A, B,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`slots` int64 [S, 3]: where the result is in memory, and its rows' begin and end; `like` gives its dtype."""
    num_a, num_b = tl.cdiv(A, BM), tl.cdiv(B, BN)
    slot = slots + 3 * (tl.program_id(0) // (num_a * num_b))
    m, n = _locate(tl.program_id(0) % (num_a * num_b), num_a, num_b, GROUP)
    begin, end = tl.load(slot + 1).to(tl.int32), tl.load(slot + 2).to(tl.int32)
    total = tl.zeros((BM, BN), tl.float32)
    whole = begin + (end - begin) // BK * BK
    for k in range(begin, whole, BK):
        total = tl.dot(left.load([k, m * BM]).T, right.load([k, n * BN]), total, input_precision="ieee")
    if whole < end:  # what the descriptors bring beyond the segment's end belongs to another
        is_inside = (whole + tl.arange(0, BK) < end)[:, None]
        last = tl.where(is_inside, left.load([whole, m * BM]), 0.0)
        last_right = tl.where(is_inside, right.load([whole, n * BN]), 0.0)
        total = tl.dot(last.T, last_right, total, input_precision="ieee")
    row, column = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    at = tl.load(slot).to(tl.pointer_type(like.dtype.element_ty)) + (row[:, None] * B + column[None, :])
    inside = (row < A)[:, None] & (column < B)[None, :]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(like.dtype.element_ty), mask=inside)


def segment_mm(rows_MA: Tensor, weights: Matrices, sizes: list[int], out_MB: Tensor, transpose: bool) -> None:
    """As `Backend.segment_mm`."""
    if not len(rows_MA):
        return
    tile, launch = _tile(rows_MA.device)
    tiles, num_tiles = _cut_tiles(tuple(sizes), tile["BM"], rows_MA.device)
    width, columns = rows_MA.shape[1], out_MB.shape[1]
    of_weights = [1, tile["BN"], tile["BK"]] if transpose else [1, tile["BK"], tile["BN"]]
    _segment_mm[(num_tiles * triton.cdiv(columns, tile["BN"]),)](
        TensorDescriptor.from_tensor(rows_MA, [tile["BM"], tile["BK"]]),
        TensorDescriptor.from_tensor(_stack(weights), of_weights),
        *(out_MB, tiles, num_tiles, width, columns),
        TRANSPOSE=transpose,
        **tile,
        **launch,
    )


def segment_outer(left_MA: Tensor, right_MB: Tensor, sizes: list[int], out_SAB: Matrices, add: bool) -> Matrices:
    """As `Backend.segment_outer`; `out_SAB` itself is returned."""
    (width, columns), num_slots = (left_MA.shape[1], right_MB.shape[1]), len(sizes)
    if not num_slots:
        return out_SAB
    if not len(left_MA):  # descriptors are of memory that is there
        for out_AB in () if add else out_SAB:
            out_AB.zero_()
        return out_SAB
    tile, launch = _tile(left_MA.device)
    ends, order = np.cumsum(sizes), np.argsort(sizes)[::-1]  # the longest first: short ones fill the end
    slots = np.stack([_addresses(out_SAB), ends - sizes, ends], 1)[order]
    _segment_outer[(num_slots * triton.cdiv(width, tile["BM"]) * triton.cdiv(columns, tile["BN"]),)](
        TensorDescriptor.from_tensor(left_MA, [tile["BK"], tile["BM"]]),
        TensorDescriptor.from_tensor(right_MB, [tile["BK"], tile["BN"]]),
        *(upload(slots, left_MA.device), out_SAB[0], width, columns),
        ADD=add,
        **tile,
        **launch,
    )
    return out_SAB


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether this device can compute these products: it has the tensor memory engine, and room for a tile."""
    is_known = device.type == "cuda" and dtype in DTYPES
    return is_known and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _tile(device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    return (TILE, LAUNCH) if device.type == "cuda" else (INTERPRETED, {})


@lru_cache(maxsize=KNOWN_SIZES)
def _cut_tiles(sizes: tuple[int, ...], step: int, device: torch.device) -> tuple[Tensor, int]:
    """Cut segments of rows at multiples of `step`; return for each piece its slot, its begin, its segment's end."""
    size_S = np.array(sizes)
    count_S, end_S = -(-size_S // step), np.cumsum(size_S)
    slot = np.repeat(np.arange(len(sizes)), count_S)
    in_slot = np.arange(len(slot)) - (np.cumsum(count_S) - count_S)[slot]
    table = np.stack([slot, (end_S - size_S)[slot] + in_slot * step, end_S[slot]], 1).astype(np.int32)
    return upload(table, device), len(slot)


def _stack(weights: Matrices) -> Tensor:
    """Return matrices as one tensor: a view where they lie at equal distances in memory, as lent ones do."""
    if isinstance(weights, Tensor):
        return weights
    first, size = weights[0], weights[0].element_size()
    steps = np.diff(_addresses(weights)) // size
    same = all(w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for w in weights)
    if len(weights) == 1 or (same and steps[0] > 0 and (steps == steps[0]).all()):
        step = int(steps[0]) if len(steps) else first.numel()
        return first.as_strided((len(weights), *first.shape), (step, *first.stride()))
    return torch.stack(list(weights))


def _addresses(matrices: Sequence[Tensor] | Tensor) -> np.ndarray:
    """Return where each of the matrices is in memory."""
    if isinstance(matrices, Tensor):
        step = matrices.stride(0) * matrices.element_size()
        return matrices.data_ptr() + step * np.arange(len(matrices))
    return np.array([matrix.data_ptr() for matrix in matrices])

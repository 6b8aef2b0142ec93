"""Grouped GEMM for CPUs with AVX512-BF16: bf16 (without AMX, where oneDNN is faster), and fp32 on those of AMD, where
MKL leaves half of the machine unused.

A product per segment through `torch.mm` reorders its weights for every call and compiles a kernel for every new number
of rows. Here weights are packed once per product, in passes that read memory in order, and one register tile serves
any number of rows: no padding, and a segment of few rows costs little more than reading its weights.

The right operand comes packed in panels of 32 columns, [lanes of K][32], as the tile of `cpu_gemm_code` reads it.
The loops around it keep a panel in L1 and a block of left rows in L2 (Goto and van de Geijn, 2008).

M rows, K summed over, N columns; addresses, strides and the size of an element in bytes.
"""

import os
import threading
from functools import cache, partial
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from torch import Tensor

from moetrain.moe.compiled import njit
from moetrain.moe.kernels.cpu_fused import share
from moetrain.moe.kernels.cpu_gemm_code import (
    PANEL,
    copy_lanes,
    pair_rows,
    prefetch,
    tile,
    transpose_pairs,
    widen_lanes,
)
from moetrain.moe.kernels.reference import Matrices

GROUP = 4  # panels that are packed together
FEW = 128  # rows, up to which weights are read once and in order
FEW_DEPTH = 256  # rows of them at a time
ROW_BLOCK = 512 << 10  # bytes of left rows that stay in L2
SUM_LANES = 512  # of a weight gradient's sum that are packed at a time

_compiled = partial(njit, nogil=True, error_model="numpy")


@_compiled()
def tiles(left, left_row, panel, lanes, start, out, out_row, narrow, count, ahead, end, size):  # type: ignore[no-untyped-def]
    """Multiply `count` rows with one panel.

    Meanwhile each tile fetches a line for every lane, from `ahead` on, if that is before `end`. `start`: the sums of
    all rows so far, or 0.
    """
    wide = 8 if size == 4 else 0
    for m in range(0, count, 8):
        fetch, fetch_lane = (ahead, 64) if ahead < end else (left, 0)
        ahead += 64 * lanes
        at, begun, to = left + m * left_row, start + 128 * m if start else 0, out + m * out_row
        rows = wide + min(count - m, 8)
        tile(rows, at, left_row, 4, panel, lanes, begun, to, out_row, narrow, fetch, fetch_lane)


@_compiled()
def pack(source, row, count, panels, to, stride, size):  # type: ignore[no-untyped-def]
    """Pack `count` rows, `row` apart, of a few panels; in bf16 an odd last row is paired with zeros."""
    if size == 4:
        for m in range(count):
            one = source + m * row
            for p in range(panels):
                prefetch(one + 128 * p + 32 * row)
                prefetch(one + 128 * p + 64 + 32 * row)
                copy_lanes(one + 128 * p, to + p * stride + 128 * m)
                copy_lanes(one + 128 * p + 64, to + p * stride + 128 * m + 64)
        return
    for pair in range((count + 1) // 2):
        one = source + 2 * pair * row
        two = one + row if 2 * pair + 1 < count else 0
        for p in range(panels):
            prefetch(one + 64 * p + 32 * row)
            prefetch(one + 64 * p + 33 * row)
            pair_rows(one + 64 * p, two + 64 * p if two else 0, to + p * stride + 128 * pair)
            pair_rows(one + 64 * p + 32, two + 64 * p + 32 if two else 0, to + p * stride + 128 * pair + 64)


@_compiled()
def pack_transposed(source, row, length, panels, to, stride):  # type: ignore[no-untyped-def]
    """Pack a few panels of 32 rows each, `length` bytes of them, `row` apart."""
    for p in range(panels):
        for lane in range(0, length // 4, 16):
            one, at = source + 32 * p * row + 4 * lane, to + p * stride + 128 * lane
            transpose_pairs(one, row, at, 128)
            transpose_pairs(one + 16 * row, row, at + 64, 128)


@_compiled()
def _few(left, weight, out, count, depth, width, first, last, packed, sums, following, size):  # type: ignore[no-untyped-def]
    """Multiply a few rows with weights [K, N], which are read from beginning to end; `following`: what is read next."""
    stride, panel_width = FEW_DEPTH * 32 * size + 128, 32 * size
    left_row, row = size * depth, size * width
    for begin in range(0, depth, FEW_DEPTH):
        some = min(FEW_DEPTH, depth - begin)
        pack(weight + begin * row + panel_width * first, row, some, last - first, packed, stride, size)
        over = begin + some == depth
        ahead = following if over else weight + (begin + some) * row
        end = ahead + FEW_DEPTH * row if ahead else 0
        for p in range(last - first):
            so_far, panel, at = sums + 128 * count * p, packed + p * stride, left + size * begin
            start, lanes = so_far if begin else 0, some * size // 4
            if over:
                to = out + panel_width * (first + p)
                tiles(at, left_row, panel, lanes, start, to, row, size == 2, count, ahead, end, size)
            else:
                tiles(at, left_row, panel, lanes, start, so_far, 128, 0, count, ahead, end, size)
            ahead += 64 * lanes * ((count + 7) // 8)


@_compiled()
def _mm(left, weights, sizes, out, depth, width, transpose, first, last, packed, sums, size):  # type: ignore[no-untyped-def]
    """Compute panels `first` to `last` of all segments.

    left [M, K], weights [N, K] if `transpose` else [K, N], out [M, N].
    """
    lanes, panel_width = depth * size // 4, 32 * size
    left_row, row = size * depth, size * width
    stride = lanes * 128 + 128  # not a power of two: panels would share cache sets
    block = max(ROW_BLOCK // left_row // 8 * 8, 8)
    for s in range(len(sizes)):
        count, weight = sizes[s], weights[s]
        following = weights[s + 1] if s + 1 < len(sizes) else 0
        if count <= FEW and not transpose:
            if count:
                _few(left, weight, out, count, depth, width, first, last, packed, sums, following, size)
            left += count * left_row
            out += count * row
            continue
        for begin in range(0, count, block):
            rows = min(block, count - begin)
            for group in range(first, last, GROUP):
                some = min(GROUP, last - group)
                to = packed + (group - first) * stride * (count > block)  # used once, it need not leave the cache
                ahead = end = 0
                if begin == 0 and transpose:
                    pack_transposed(weight + 32 * left_row * group, left_row, left_row, some, to, stride)
                    ahead = weight + 32 * left_row * (group + some) if group + some < last else following
                    end = ahead + 32 * left_row * GROUP if ahead else 0
                elif begin == 0:
                    pack(weight + panel_width * group, row, depth, some, to, stride, size)
                for p in range(some):
                    at = out + begin * row + panel_width * (group + p)
                    panel = to + p * stride
                    one = left + begin * left_row
                    tiles(one, left_row, panel, lanes, 0, at, row, size == 2, rows, ahead, end, size)
                    ahead += 64 * lanes * ((rows + 7) // 8)
        left += count * left_row
        out += count * row


@_compiled()
def _outer_tile(source, panel, lanes, total, ends, load, at, row, size):  # type: ignore[no-untyped-def]
    """Compute 8 × 32 elements at `at`, and fetch the next tile's sums meanwhile.

    `total`: their sums in fp32, if these are begun and not done with; `load`: begin with what is in the elements.
    """
    begun, done = ends
    if load:
        for m in range(8):
            if size == 4:
                copy_lanes(at + m * row, total + 128 * m)
                copy_lanes(at + m * row + 64, total + 128 * m + 64)
            else:
                widen_lanes(at + m * row, total + 128 * m)
                widen_lanes(at + m * row + 32, total + 128 * m + 64)
    start, kind = total if begun else 0, 16 if size == 4 else 8
    ahead, step = (total + 1024, max(1024 // lanes, 1)) if begun and not load else (source, 0)
    if done:
        tile(kind, source, 4, 64, panel, lanes, start, at, row, size == 2, ahead, step)
    else:
        tile(kind, source, 4, 64, panel, lanes, start, total, 128, 0, ahead, step)


@_compiled()
def pack_left(left, row, begin, end, at, to, size):  # type: ignore[no-untyped-def]
    """Pack 16 columns, from byte `at` on, of rows `begin` to `end`: 16 lanes a row, or a pair of rows."""
    if size == 4:
        for m in range(begin, end):
            copy_lanes(left + m * row + at, to + 64 * (m - begin))
    else:
        for m in range(begin, end, 2):
            one = left + m * row + at
            pair_rows(one, one + row if m + 1 < end else 0, to + 32 * (m - begin))


@_compiled()
def _outer(left, right, sizes, outs, height, width, add, first, last, packed_left, packed_right, sums, size):  # type: ignore[no-untyped-def]
    """Compute groups `first` to `last` of 16 rows of outs [height, width] (+)= leftᵀ · right; left [M, height]."""
    stride, panel_stride = SUM_LANES * 64 + 64, FEW * 32 * size + 128
    panels, halves, sum_block = width // 32, 2 * (last - first), SUM_LANES * 4 // size
    left_row, row = size * height, size * width
    for s in range(len(sizes)):
        count, out = sizes[s], outs[s]
        blocks = (count + sum_block - 1) // sum_block
        for block in range(blocks):
            begin = block * sum_block
            end = min(begin + sum_block, count)
            lanes = end - begin if size == 4 else (end - begin + 1) // 2
            for group in range(first, last):
                to = packed_left + (group - first) * stride
                pack_left(left, left_row, begin, end, 16 * size * group, to, size)
            few = count <= FEW  # all panels of the right side fit beside each other: rows are then written whole
            ends = (block > 0 or add, block == blocks - 1)
            for p in range(panels):
                to = packed_right + p * panel_stride * few
                pack(right + begin * row + 32 * size * p, row, end - begin, 1, to, 0, size)
                if not few:
                    for half in range(halves):
                        source = packed_left + (half >> 1) * stride + 32 * (half & 1)
                        at = out + 8 * (2 * first + half) * row + 32 * size * p
                        total = sums + 1024 * (p * halves + half)
                        _outer_tile(source, to, lanes, total, ends, add and block == 0, at, row, size)
            if few:
                for half in range(halves):
                    for p in range(panels):
                        source = packed_left + (half >> 1) * stride + 32 * (half & 1)
                        at = out + 8 * (2 * first + half) * row + 32 * size * p
                        panel = packed_right + p * panel_stride
                        _outer_tile(source, panel, lanes, sums, ends, add, at, row, size)
        left += count * left_row
        right += count * row


@cache
def able(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Tell whether the code for these instructions can be made and run here, and nothing faster is there."""
    if os.environ.get("NUMBA_CPU_NAME") or os.environ.get("NUMBA_CPU_FEATURES") or os.environ.get("NUMBA_DISABLE_JIT"):
        return False
    try:
        has = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this processor
        return False
    if dtype == torch.float32:  # MKL has its AVX-512 code run on Intel's processors alone
        return bool(has.get("avx512bf16")) and llvm.get_host_cpu_name().startswith("znver")
    return dtype == torch.bfloat16 and bool(has.get("avx512bf16")) and not has.get("amx-bf16")


def fits(*tensors: Matrices) -> bool:
    """Tell whether these kernels take them.

    All bf16 or all fp32 on such a CPU, rows one after another, sizes multiples of 32 but for M.
    """
    each = [t for some in tensors for t in ([some] if isinstance(some, Tensor) else some)]
    return able(each[0].dtype) and all(
        t.device.type == "cpu" and t.dtype == each[0].dtype and t.is_contiguous() and t.shape[-1] % 32 == 0
        for t in each
    )


def segment_mm(rows_MA: Tensor, weights: Matrices, sizes: list[int], out_MB: Tensor, transpose: bool) -> None:
    """As `Backend.segment_mm`."""
    depth, width, size = rows_MA.shape[1], out_MB.shape[1], rows_MA.element_size()
    arrays = _addresses(weights), np.array(sizes, np.int64)

    def some(first: int, last: int) -> None:
        panels = last - first
        packed = scratch("right", panels * (max(depth, FEW_DEPTH) * 32 * size + 128))
        sums = scratch("sums", panels * FEW * 128)
        _mm(rows_MA.data_ptr(), *arrays, out_MB.data_ptr(), depth, width, transpose, first, last, packed, sums, size)

    share(width // PANEL, 1, some)


def segment_outer(left_MA: Tensor, right_MB: Tensor, sizes: list[int], out_SAB: Matrices, add: bool) -> Matrices:
    """As `Backend.segment_outer`."""
    height, width, size = left_MA.shape[1], right_MB.shape[1], left_MA.element_size()
    arrays = np.array(sizes, np.int64), _addresses(out_SAB)
    if not add:
        for out_AB, count in zip(out_SAB, sizes, strict=True):
            if not count:
                out_AB.zero_()
    several = add or max(sizes, default=0) > SUM_LANES * 4 // size

    def some(first: int, last: int) -> None:
        groups = last - first
        packed_left = scratch("left", groups * (64 * SUM_LANES + 64))
        packed_right = scratch("right", max(128 * SUM_LANES, width // 32 * (32 * size * FEW + 128)))
        sums = scratch("sums", 2048 * groups * width // 32 if several else 0)
        ends = height, width, add, first, last
        _outer(left_MA.data_ptr(), right_MB.data_ptr(), *arrays, *ends, packed_left, packed_right, sums, size)

    share(height // 16, 1, some)
    return out_SAB


def _addresses(matrices: Matrices) -> Any:
    return np.array([matrix.data_ptr() for matrix in matrices], np.int64)


_own = threading.local()


def scratch(name: str, size: int) -> int:
    """Return the address of memory of this thread that is kept for the next call."""
    kept = vars(_own).get(name)
    if kept is None or kept.nbytes < size:
        kept = vars(_own)[name] = np.empty(max(size, 1), np.uint8)
    return kept.ctypes.data

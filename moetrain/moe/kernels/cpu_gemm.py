"""Grouped GEMM for CPUs with AVX512-BF16: bf16 (without AMX, where oneDNN is faster), and fp32 on those of AMD, where
MKL leaves half of the machine unused.

A product per segment through `torch.mm` reorders its weights for every call and compiles a kernel for every new number
of rows. Here weights are packed once per product, in passes that read memory in order, and one register tile serves
any number of rows: no padding, and a segment of few rows costs little more than reading its weights.

The tile: 8 rows × 32 columns of fp32 sums in registers, `vdpbf16ps` adding two products to each at a time, or an fma
one. The right operand comes packed in panels of 32 columns, [lanes of K][32]; a lane of four bytes is a pair of bf16
or one fp32, and of the left operand one is broadcast.
The loops around it keep a panel in L1 and a block of left rows in L2 (Goto and van de Geijn, 2008).

M rows, K summed over, N columns; addresses, strides and the size of an element in bytes.
"""

import os
import threading
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from moetrain.moe.compiled import njit
from moetrain.moe.kernels.cpu_fused import share

PANEL = 32  # columns
GROUP = 4  # panels that are packed together
FEW = 128  # rows, up to which weights are read once and in order
FEW_DEPTH = 256  # rows of them at a time
ROW_BLOCK = 512 << 10  # bytes of left rows that stay in L2
SUM_LANES = 512  # of a weight gradient's sum that are packed at a time

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_HALVES, _PAIRS, _SUMS = ir.VectorType(_I16, 16), ir.VectorType(_I32, 16), ir.VectorType(_F32, 16)
_compiled = partial(njit, nogil=True, error_model="numpy")
_intrinsic: Any = intrinsic


def _at(builder: Any, base: Any, kind: Any, stride: Any = None, times: int = 0, plus: int = 0) -> Any:
    """A pointer to base + stride · times + plus."""
    if stride is not None:
        base = builder.add(base, builder.mul(stride, ir.Constant(_I64, times)))
    return builder.inttoptr(builder.add(base, ir.Constant(_I64, plus)), kind.as_pointer())


def _emit_fetch(builder: Any, at: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_I32.as_pointer(), _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [at, *(ir.Constant(_I32, n) for n in (0, 2, 1))])  # to read, into L2, data


def _emit_tile(builder: Any, rows: int, wide: bool, arguments: Any) -> None:
    """A tile of `rows` × 32; `wide`: of fp32."""
    left, left_row, left_pair, panel, pairs, start, out, out_row, narrow, ahead, ahead_pair = arguments
    zero = ir.Constant(_I64, 0)
    call = lambda name, kind: cgutils.get_or_insert_function(builder.module, kind, name)  # noqa: E731
    if wide:
        operand = _SUMS
        fma = call("llvm.fma.v16f32", ir.FunctionType(_SUMS, [_SUMS, _SUMS, _SUMS]))
        dot = lambda total, left, right: builder.call(fma, [left, right, total])  # noqa: E731
    else:
        operand = _PAIRS
        dots = call("llvm.x86.avx512bf16.dpbf16ps.512", ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS]))
        dot = lambda total, left, right: builder.call(dots, [total, left, right])  # noqa: E731
    to_bf16 = call("llvm.x86.avx512bf16.cvtneps2bf16.512", ir.FunctionType(_HALVES, [_SUMS]))
    cells = [(m, v) for m in range(rows) for v in (0, 1)]
    before = builder.block
    load, loop, end, short, full, done = (
        builder.function.append_basic_block(name) for name in ("load", "loop", "end", "short", "full", "done")
    )
    builder.cbranch(builder.icmp_signed("!=", start, zero), load, loop)

    builder.position_at_end(load)
    begun = [builder.load(_at(builder, start, _SUMS, plus=128 * m + 64 * v), align=4) for m, v in cells]
    builder.branch(loop)

    builder.position_at_end(loop)
    turn, at_left, at_panel, at_ahead = (builder.phi(_I64) for _ in range(4))
    sums = [builder.phi(_SUMS) for _ in cells]
    for phi, value in ((turn, zero), (at_left, left), (at_panel, panel), (at_ahead, ahead)):
        phi.add_incoming(value, before)
        phi.add_incoming(value, load)
    for phi, value in zip(sums, begun, strict=True):
        phi.add_incoming(ir.Constant(_SUMS, [0.0] * 16), before)
        phi.add_incoming(value, load)
    right = [builder.load(_at(builder, at_panel, operand, plus=64 * v), align=4) for v in (0, 1)]
    none = ir.Constant(operand, ir.Undefined)
    found = []
    for m in range(rows):
        pair = builder.load(_at(builder, at_left, operand.element, left_row, m), align=2)
        first = builder.insert_element(none, pair, ir.Constant(_I32, 0))
        everywhere = builder.shuffle_vector(first, none, ir.Constant(_PAIRS, [0] * 16))
        found += [dot(sums[2 * m + v], everywhere, right[v]) for v in (0, 1)]
    _emit_fetch(builder, _at(builder, at_ahead, _I32))
    one, panel_pair = (ir.Constant(_I64, n) for n in (1, 128))
    steps = ((turn, one), (at_left, left_pair), (at_panel, panel_pair), (at_ahead, ahead_pair))
    for phi, step in steps:
        phi.add_incoming(builder.add(phi, step), loop)
    for phi, value in zip(sums, found, strict=True):
        phi.add_incoming(value, loop)
    more = builder.icmp_signed("<", builder.add(turn, ir.Constant(_I64, 1)), pairs)
    builder.cbranch(more, loop, end)

    builder.position_at_end(end)
    builder.cbranch(builder.icmp_signed("!=", narrow, zero), short, full)
    builder.position_at_end(short)
    halves = [] if wide else [builder.call(to_bf16, [value]) for value in found]
    both = ir.Constant(ir.VectorType(_I32, 32), list(range(32)))
    for m in range(0 if wide else rows):
        row = builder.shuffle_vector(halves[2 * m], halves[2 * m + 1], both)
        builder.store(row, _at(builder, out, ir.VectorType(_I16, 32), out_row, m), align=2)
    builder.branch(done)
    builder.position_at_end(full)
    for (m, v), value in zip(cells, found, strict=True):
        builder.store(value, _at(builder, out, _SUMS, out_row, m, plus=64 * v), align=4)
    builder.branch(done)
    builder.position_at_end(done)


@_intrinsic
def tile(typing, kind, left, left_row, left_pair, panel, pairs, start, out, out_row, narrow, ahead, ahead_pair):  # type: ignore[no-untyped-def]
    """A tile of 1 to 8 rows × 32. `kind`: its rows, and 8 more for fp32; `start`: address of fp32 sums [rows, 32] to
    begin with, or 0; `narrow`: bf16 out; `ahead`: what is fetched meanwhile, a line for every lane, `ahead_pair`
    apart."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        over = builder.function.append_basic_block("over")
        choose = builder.switch(arguments[0], over)
        for kind in range(1, 17):
            block = builder.function.append_basic_block(f"kind{kind}")
            choose.add_case(ir.Constant(_I64, kind), block)
            builder.position_at_end(block)
            _emit_tile(builder, (kind - 1) % 8 + 1, kind > 8, arguments[1:])
            builder.branch(over)
        builder.position_at_end(over)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), code


@_intrinsic
def _fetch(typing, address):  # type: ignore[no-untyped-def]
    """Bring it into L2; nothing if there is no such memory."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_fetch(builder, _at(builder, arguments[0], _I32))
        return context.get_dummy_value()

    return types.void(types.int64), code


@_intrinsic
def _transpose(typing, source, source_row, to, to_row):  # type: ignore[no-untyped-def]
    """16 × 16 pairs; what the next panel will read is fetched ahead."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_row, to, to_row = arguments
        for m in range(16):
            _emit_fetch(builder, _at(builder, source, _I32, source_row, m + PANEL))
        rows = [builder.load(_at(builder, source, _PAIRS, source_row, m), align=2) for m in range(16)]
        for bit in (8, 4, 2, 1):  # exchange the halves of all pairs of rows that differ in this bit
            low = [n if not n & bit else 16 + n - bit for n in range(16)]
            high = [n + bit if not n & bit else 16 + n for n in range(16)]
            for m in range(16):
                if not m & bit:
                    one, two = rows[m], rows[m | bit]
                    rows[m] = builder.shuffle_vector(one, two, ir.Constant(_PAIRS, low))
                    rows[m | bit] = builder.shuffle_vector(one, two, ir.Constant(_PAIRS, high))
        for m, row in enumerate(rows):
            builder.store(row, _at(builder, to, _PAIRS, to_row, m), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


@_intrinsic
def _pair_up(typing, one, two, to):  # type: ignore[no-untyped-def]
    """16 elements of a row and of the next become 16 pairs; `two` 0: the next row is zero."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, two, to = arguments
        shift = ir.Constant(_PAIRS, [16] * 16)
        low = builder.zext(builder.load(_at(builder, one, _HALVES), align=2), _PAIRS)
        is_there = builder.icmp_signed("!=", two, ir.Constant(_I64, 0))
        second = builder.load(_at(builder, builder.select(is_there, two, one), _HALVES), align=2)
        high = builder.shl(builder.zext(second, _PAIRS), shift)
        high = builder.select(is_there, high, ir.Constant(_PAIRS, [0] * 16))
        builder.store(builder.or_(low, high), _at(builder, to, _PAIRS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), code


@_intrinsic
def _copy(typing, source, to):  # type: ignore[no-untyped-def]
    """16 fp32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, to = arguments
        some = builder.load(_at(builder, source, _SUMS), align=4)
        builder.store(some, _at(builder, to, _SUMS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), code


@_intrinsic
def _widen(typing, source, to):  # type: ignore[no-untyped-def]
    """16 bf16 as fp32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, to = arguments
        wide = builder.zext(builder.load(_at(builder, source, _HALVES), align=2), _PAIRS)
        builder.store(builder.shl(wide, ir.Constant(_PAIRS, [16] * 16)), _at(builder, to, _PAIRS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), code


@_compiled()
def tiles(left, left_row, panel, lanes, start, out, out_row, narrow, count, ahead, end, size):  # type: ignore[no-untyped-def]
    """`count` rows through one panel. Meanwhile each tile fetches a line for every lane, from `ahead` on, if that is
    before `end`. `start`: the sums of all rows so far, or 0."""
    wide = 8 if size == 4 else 0
    for m in range(0, count, 8):
        fetch, fetch_lane = (ahead, 64) if ahead < end else (left, 0)
        ahead += 64 * lanes
        at, begun, to = left + m * left_row, start + 128 * m if start else 0, out + m * out_row
        rows = wide + min(count - m, 8)
        tile(rows, at, left_row, 4, panel, lanes, begun, to, out_row, narrow, fetch, fetch_lane)


@_compiled()
def pack(source, row, count, panels, to, stride, size):  # type: ignore[no-untyped-def]
    """`count` rows, `row` apart, of a few panels; in bf16 an odd last row is paired with zeros."""
    if size == 4:
        for m in range(count):
            one = source + m * row
            for p in range(panels):
                _fetch(one + 128 * p + 32 * row)
                _fetch(one + 128 * p + 64 + 32 * row)
                _copy(one + 128 * p, to + p * stride + 128 * m)
                _copy(one + 128 * p + 64, to + p * stride + 128 * m + 64)
        return
    for pair in range((count + 1) // 2):
        one = source + 2 * pair * row
        two = one + row if 2 * pair + 1 < count else 0
        for p in range(panels):
            _fetch(one + 64 * p + 32 * row)
            _fetch(one + 64 * p + 33 * row)
            _pair_up(one + 64 * p, two + 64 * p if two else 0, to + p * stride + 128 * pair)
            _pair_up(one + 64 * p + 32, two + 64 * p + 32 if two else 0, to + p * stride + 128 * pair + 64)


@_compiled()
def pack_transposed(source, row, length, panels, to, stride):  # type: ignore[no-untyped-def]
    """A few panels of 32 rows each, `length` bytes of them, `row` apart."""
    for p in range(panels):
        for lane in range(0, length // 4, 16):
            one, at = source + 32 * p * row + 4 * lane, to + p * stride + 128 * lane
            _transpose(one, row, at, 128)
            _transpose(one + 16 * row, row, at + 64, 128)


@_compiled()
def _few(left, weight, out, count, depth, width, first, last, packed, sums, following, size):  # type: ignore[no-untyped-def]
    """A few rows times weights [K, N], which are read from beginning to end; `following`: what is read next."""
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
    """Panels `first` to `last` of all segments: left [M, K], weights [N, K] if `transpose` else [K, N], out [M, N]."""
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
    """8 × 32 elements at `at`; `total`: their sums in fp32, if these are begun and not done with; `load`: begin with
    what is in the elements. The next tile's sums are fetched meanwhile."""
    begun, done = ends
    if load:
        for m in range(8):
            if size == 4:
                _copy(at + m * row, total + 128 * m)
                _copy(at + m * row + 64, total + 128 * m + 64)
            else:
                _widen(at + m * row, total + 128 * m)
                _widen(at + m * row + 32, total + 128 * m + 64)
    start, kind = total if begun else 0, 16 if size == 4 else 8
    ahead, step = (total + 1024, max(1024 // lanes, 1)) if begun and not load else (source, 0)
    if done:
        tile(kind, source, 4, 64, panel, lanes, start, at, row, size == 2, ahead, step)
    else:
        tile(kind, source, 4, 64, panel, lanes, start, total, 128, 0, ahead, step)


@_compiled()
def pack_left(left, row, begin, end, at, to, size):  # type: ignore[no-untyped-def]
    """16 columns, from byte `at` on, of rows `begin` to `end`: 16 lanes a row, or a pair of rows."""
    if size == 4:
        for m in range(begin, end):
            _copy(left + m * row + at, to + 64 * (m - begin))
    else:
        for m in range(begin, end, 2):
            one = left + m * row + at
            _pair_up(one, one + row if m + 1 < end else 0, to + 32 * (m - begin))


@_compiled()
def _outer(left, right, sizes, outs, height, width, add, first, last, packed_left, packed_right, sums, size):  # type: ignore[no-untyped-def]
    """Groups `first` to `last` of 16 rows of outs [height, width] (+)= leftᵀ · right; left [M, height]."""
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
    """Whether the code for these instructions can be made and run here, and nothing faster is there."""
    if os.environ.get("NUMBA_CPU_NAME") or os.environ.get("NUMBA_CPU_FEATURES") or os.environ.get("NUMBA_DISABLE_JIT"):
        return False
    try:
        has = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this processor
        return False
    if dtype == torch.float32:  # MKL has its AVX-512 code run on Intel's processors alone
        return bool(has.get("avx512bf16")) and llvm.get_host_cpu_name().startswith("znver")
    return dtype == torch.bfloat16 and bool(has.get("avx512bf16")) and not has.get("amx-bf16")


def fits(*tensors: Tensor | Sequence[Tensor]) -> bool:
    """Whether these kernels take them: all bf16 or all fp32 on such a CPU, rows one after another, sizes multiples of
    32 but for M."""
    each = [t for some in tensors for t in ([some] if isinstance(some, Tensor) else some)]
    return able(each[0].dtype) and all(
        t.device.type == "cpu" and t.dtype == each[0].dtype and t.is_contiguous() and t.shape[-1] % 32 == 0
        for t in each
    )


def segment_mm(
    rows_MA: Tensor, weights: Tensor | Sequence[Tensor], sizes: list[int], out_MB: Tensor, transpose: bool
) -> None:
    """As `kernels.segment_mm`."""
    depth, width, size = rows_MA.shape[1], out_MB.shape[1], rows_MA.element_size()
    arrays = _addresses(weights), np.array(sizes, np.int64)

    def some(first: int, last: int) -> None:
        panels = last - first
        packed = scratch("right", panels * (max(depth, FEW_DEPTH) * 32 * size + 128))
        sums = scratch("sums", panels * FEW * 128)
        _mm(rows_MA.data_ptr(), *arrays, out_MB.data_ptr(), depth, width, transpose, first, last, packed, sums, size)

    share(width // PANEL, 1, some)


def segment_outer(
    left_MA: Tensor, right_MB: Tensor, sizes: list[int], out_SAB: Tensor | Sequence[Tensor], add: bool
) -> None:
    """As `kernels.segment_outer`."""
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


def _addresses(matrices: Tensor | Sequence[Tensor]) -> Any:
    return np.array([matrix.data_ptr() for matrix in matrices], np.int64)


_own = threading.local()


def scratch(name: str, size: int) -> int:
    """Address of memory of this thread that is kept for the next call."""
    kept = vars(_own).get(name)
    if kept is None or kept.nbytes < size:
        kept = vars(_own)[name] = np.empty(max(size, 1), np.uint8)
    return kept.ctypes.data

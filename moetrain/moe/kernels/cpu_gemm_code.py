"""The machine code of `cpu_gemm`, emitted through LLVM: the register tile, and what moves operands into panels.

The tile: 8 rows × 32 columns of fp32 sums in registers, `vdpbf16ps` adding two products to each at a time, or an fma
one. A lane of four bytes is a pair of bf16 or one fp32; of the left operand one lane is broadcast.

Addresses, strides and the size of an element in bytes.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

PANEL = 32  # columns
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_HALVES, _PAIRS, _SUMS = ir.VectorType(_I16, 16), ir.VectorType(_I32, 16), ir.VectorType(_F32, 16)
_intrinsic: Any = intrinsic


def _at(builder: Any, base: Any, kind: Any, stride: Any = None, times: int = 0, plus: int = 0) -> Any:
    """Return a pointer to base + stride · times + plus."""
    if stride is not None:
        base = builder.add(base, builder.mul(stride, ir.Constant(_I64, times)))
    return builder.inttoptr(builder.add(base, ir.Constant(_I64, plus)), kind.as_pointer())


def _emit_fetch(builder: Any, at: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_I32.as_pointer(), _I32, _I32, _I32])
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [at, *(ir.Constant(_I32, n) for n in (0, 2, 1))])  # to read, into L2, data


def _emit_tile(builder: Any, rows: int, wide: bool, arguments: Any) -> None:
    """Emit the code of a tile of `rows` × 32; `wide`: of fp32."""
    left, left_row, left_pair, panel, pairs, start, out, out_row, narrow, ahead, ahead_pair = arguments
    zero = ir.Constant(_I64, 0)
    call: Callable[..., Any] = lambda name, kind: cgutils.get_or_insert_function(builder.module, kind, name)  # noqa: E731
    if wide:
        operand = _SUMS
        fma = call("llvm.fma.v16f32", ir.FunctionType(_SUMS, [_SUMS, _SUMS, _SUMS]))
        dot: Callable[..., Any] = lambda total, left, right: builder.call(fma, [left, right, total])  # noqa: E731
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
    """Compute a tile of 1 to 8 rows × 32.

    `kind`: its rows, and 8 more for fp32; `start`: address of fp32 sums [rows, 32] to begin with, or 0; `narrow`: bf16
    out; `ahead`: what is fetched meanwhile, a line for every lane, `ahead_pair` apart.
    """

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
def prefetch(typing, address):  # type: ignore[no-untyped-def]
    """Fetch a cache line into L2; nothing if there is no such memory."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _emit_fetch(builder, _at(builder, arguments[0], _I32))
        return context.get_dummy_value()

    return types.void(types.int64), code


@_intrinsic
def transpose_pairs(typing, source, source_row, to, to_row):  # type: ignore[no-untyped-def]
    """Transpose 16 × 16 pairs; what the next panel will read is fetched ahead."""

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
def pair_rows(typing, one, two, to):  # type: ignore[no-untyped-def]
    """Pair 16 elements of a row with those of the next; `two` 0: the next row is zero."""

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
def copy_lanes(typing, source, to):  # type: ignore[no-untyped-def]
    """Copy 16 fp32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, to = arguments
        some = builder.load(_at(builder, source, _SUMS), align=4)
        builder.store(some, _at(builder, to, _SUMS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), code


@_intrinsic
def widen_lanes(typing, source, to):  # type: ignore[no-untyped-def]
    """Copy 16 bf16 as fp32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, to = arguments
        wide = builder.zext(builder.load(_at(builder, source, _HALVES), align=2), _PAIRS)
        builder.store(builder.shl(wide, ir.Constant(_PAIRS, [16] * 16)), _at(builder, to, _PAIRS), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), code

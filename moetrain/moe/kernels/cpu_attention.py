"""Causal attention for CPUs where the GEMM of `cpu_gemm` runs, forward and backward.

In the order of FlashAttention (Dao et al., 2022): scores of a block of queries at a time, of which the backward keeps
no more than a number a row. All keys of a block fit beside it, so a row's softmax is done at once, and keys behind the
block are left out. Products run through the tile of `cpu_gemm_code`, the softmax in fp32 in between.

B sequences, L positions, A heads, G key/value heads, C head width; addresses and strides in bytes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.moe.compiled import njit
from moetrain.moe.kernels import cpu_gemm
from moetrain.moe.kernels.cpu_fused import LOG2_E, array, narrow, power_of_two, share, wide
from moetrain.moe.kernels.cpu_gemm import pack, pack_left, pack_transposed, scratch, tiles
from moetrain.moe.kernels.cpu_gemm_code import PANEL, tile

ROWS = 64  # queries of a block
_compiled = partial(njit, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "arcp", "nsz"})


def fits(q_BALC: Tensor, k_BGLC: Tensor) -> bool:
    """Tell whether these kernels take them: on such a CPU, in fp32 or bf16, lengths and head widths multiples of 32."""
    return (
        q_BALC.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and cpu_gemm.able(q_BALC.dtype)
        and q_BALC.shape[2] % PANEL == 0
        and q_BALC.shape[3] % PANEL == 0
        and q_BALC.shape[2] == k_BGLC.shape[2]
    )


def attention(q_BALC: Tensor, k_BGLC: Tensor, v_BGLC: Tensor) -> Tensor:
    """Return [B, L, A, C], contiguous: softmax(q kᵀ / √C) v, every position looking at itself and what is before it.

    A is a multiple of G; head a looks at key/value head a · G // A.
    """
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_BALC, k_BGLC, v_BGLC)]
    run: Callable[..., Tensor] = _Attention.apply
    return run(*rows)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BALC: Tensor, k_BGLC: Tensor, v_BGLC: Tensor) -> Tensor:
        batch, heads, length, width = q_BALC.shape
        out_BLAC = q_BALC.new_empty(batch, length, heads, width)
        log_sum_BAL = q_BALC.new_empty(batch, heads, length, dtype=torch.float32)
        places = [_place(x) for x in (q_BALC, k_BGLC, v_BGLC, out_BLAC.transpose(1, 2))]
        sizes = k_BGLC.shape[1], heads // k_BGLC.shape[1], length, width, q_BALC.element_size()

        def some(begin: int, end: int) -> None:
            packed, kept = _scratch(length, width, sizes[-1]), q_BALC.new_empty(ROWS, length)
            score = np.empty((ROWS, length), np.float32)
            _forward(begin, end, *places, array(log_sum_BAL).reshape(-1, length), sizes, packed, score, array(kept))

        share(batch * k_BGLC.shape[1], 1, some)
        ctx.save_for_backward(q_BALC, k_BGLC, v_BGLC, out_BLAC, log_sum_BAL)
        return out_BLAC

    @staticmethod
    def backward(ctx: Any, grad_BLAC: Tensor) -> Any:
        q_BALC, k_BGLC, v_BGLC, out_BLAC, log_sum_BAL = ctx.saved_tensors
        batch, heads, length, width = q_BALC.shape
        grad_BLAC = grad_BLAC.contiguous()
        new = [x.new_empty(batch, length, x.shape[1], width).transpose(1, 2) for x in (q_BALC, k_BGLC, v_BGLC)]
        places = [_place(x) for x in (q_BALC, k_BGLC, v_BGLC, grad_BLAC.transpose(1, 2), *new)]
        rows = [array(x).reshape(batch * length, heads * width) for x in (out_BLAC, grad_BLAC)]
        sizes = k_BGLC.shape[1], heads // k_BGLC.shape[1], length, width, q_BALC.element_size()

        def some(begin: int, end: int) -> None:
            packed, kept = _scratch(length, width, sizes[-1]), q_BALC.new_empty(2, ROWS, length)
            score = np.empty((2, ROWS, length), np.float32)
            sums = np.empty((2, length * width), np.float32)
            log_sum = array(log_sum_BAL).reshape(-1, length)
            _backward(begin, end, *places, *rows, log_sum, sizes, packed, score, array(kept), sums)

        share(batch * k_BGLC.shape[1], 1, some)
        return tuple(new)


def _place(x_BALC: Tensor) -> tuple[int, int, int, int]:
    """Address, and strides of sequence, head and position."""
    size = x_BALC.element_size()
    return x_BALC.data_ptr(), x_BALC.stride(0) * size, x_BALC.stride(1) * size, x_BALC.stride(2) * size


def _scratch(length: int, width: int, size: int) -> tuple[int, int, int, int, int]:
    """Addresses: two in panels of positions, one in panels of its width, a block in such panels, and its columns."""
    by_position = length // PANEL * (width * size * PANEL + 128)
    by_width, block = (width // PANEL * (n * size * PANEL + 128) for n in (length, ROWS))
    begins = np.cumsum([0, by_position, by_position, by_width, block])
    base = scratch("attention", int(begins[-1]) + ROWS * 64)
    first, second, third, fourth, fifth = (base + int(begin) for begin in begins)
    return first, second, third, fourth, fifth


@_compiled()
def _softmax(score, first, count, keys, scale, log_sum, prob):  # type: ignore[no-untyped-def]
    """Rows of a block: probabilities of the `keys` columns, zero behind the row's own position."""
    factor = np.float32(scale * LOG2_E)
    most = np.empty(32, np.float32)
    for m in range(count):
        row, last = score[m], first + m
        for j in range(last + 1, keys):
            row[j] = -np.inf
        for i in range(32):
            most[i] = row[i]
        for j in range(32, keys, 32):
            for i in range(32):
                most[i] = row[j + i] if row[j + i] > most[i] else most[i]
        largest = most[0]
        for i in range(1, 32):
            largest = most[i] if most[i] > largest else largest
        total = np.float32(0.0)
        for j in range(keys):
            x = power_of_two((row[j] - largest) * factor)
            row[j] = x
            total += x
        over = np.float32(1.0) / total
        for j in range(keys):
            prob[m, j] = narrow(row[j] * over, prob[m, j])
        log_sum[last] = largest * factor + np.log2(total)


@_compiled()
def _forward(begin, end, q, k, v, out, log_sum, sizes, packed, score, prob):  # type: ignore[no-untyped-def]
    """Key/value heads `begin` to `end` of all sequences'."""
    groups, heads, length, width, size = sizes
    by_key, _, by_width, _, _ = packed
    scale = np.float32(1.0 / np.sqrt(width))
    key_step, width_step, lanes = width * size * PANEL + 128, length * size * PANEL + 128, width * size // 4
    score_at, prob_at, score_row, prob_row = score.ctypes.data, prob.ctypes.data, 4 * length, size * length
    for unit in range(begin, end):
        b, g = unit // groups, unit % groups
        pack_transposed(k[0] + b * k[1] + g * k[2], k[3], width * size, length // PANEL, by_key, key_step)
        pack(v[0] + b * v[1] + g * v[2], v[3], length, width // PANEL, by_width, width_step, size)
        for a in range(g * heads, (g + 1) * heads):
            one, to = q[0] + b * q[1] + a * q[2], out[0] + b * out[1] + a * out[2]
            for first in range(0, length, ROWS):
                count = min(ROWS, length - first)
                keys = first + count
                at = one + first * q[3]
                for p in range(keys // PANEL):
                    panel, there = by_key + p * key_step, score_at + 128 * p
                    tiles(at, q[3], panel, lanes, 0, there, score_row, 0, count, 0, 0, size)
                _softmax(score, first, count, keys, scale, log_sum[b * groups * heads + a], prob)
                for p in range(width // PANEL):
                    panel, there = by_width + p * width_step, to + first * out[3] + PANEL * size * p
                    key_lanes = keys * size // 4
                    tiles(prob_at, prob_row, panel, key_lanes, 0, there, out[3], size == 2, count, 0, 0, size)


@_compiled()
def _score_gradients(score, first, count, keys, scale, log_sum, out, grad, at, kept):  # type: ignore[no-untyped-def]
    """score [2]: of a block, and the gradients of its probabilities; kept [2]: probabilities, gradients of scores."""
    factor, width = np.float32(scale * LOG2_E), at[2]
    for m in range(count):
        delta, base = np.float32(0.0), log_sum[first + m]
        for c in range(width):
            delta += wide(out[at[0] + m, at[1] + c]) * wide(grad[at[0] + m, at[1] + c])
        for j in range(first + m + 1, keys):
            score[0, m, j] = -np.inf
        for j in range(keys):
            p = power_of_two(score[0, m, j] * factor - base)
            kept[0, m, j] = narrow(p, kept[0, m, j])
            kept[1, m, j] = narrow(p * (score[1, m, j] - delta) * scale, kept[1, m, j])


@_compiled()
def _add_outer(left, left_row, right, right_step, first, count, sums, begun, to, to_row, packed, width, size):  # type: ignore[no-untyped-def]
    """sums (tiles of 8 keys × 32) += leftᵀ · right; left [count, first + count]; right packed. Sums of the keys before
    `begun` are begun; `to`: where all of them go when this is the last addition, or 0."""
    kind, lanes, panels = 16 if size == 4 else 8, count * size // 4, width // PANEL
    for key in range(0, first + count, 8):
        if key % 16 == 0:
            pack_left(left, left_row, 0, count, size * key, packed, size)
        for p in range(panels):
            panel, total, source = (
                right + p * right_step,
                sums + 1024 * (key // 8 * panels + p),
                packed + 4 * (key % 16),
            )
            start = total if key < begun else 0
            if to:
                at = to + key * to_row + PANEL * size * p
                tile(kind, source, 4, 64, panel, lanes, start, at, to_row, size == 2, packed, 0)
            else:
                tile(kind, source, 4, 64, panel, lanes, start, total, 128, 0, packed, 0)


@_compiled()
def _backward(  # type: ignore[no-untyped-def]
    begin, end, q, k, v, grad, grad_q, grad_k, grad_v, out_rows, grad_rows, log_sum, sizes, packed, score, kept, sums
):
    """Key/value heads `begin` to `end` of all sequences'."""
    groups, heads, length, width, size = sizes
    keys_by_width, values_by_width, keys_by_key, right, left = packed
    scale = np.float32(1.0 / np.sqrt(width))
    key_step, width_step, lanes = width * size * PANEL + 128, length * size * PANEL + 128, width * size // 4
    block_step = ROWS * size * PANEL + 128
    score_at, kept_at, score_row, kept_row = score.ctypes.data, kept.ctypes.data, 4 * length, size * length
    sums_at, sums_step = sums.ctypes.data, 4 * length * width
    for unit in range(begin, end):
        b, g = unit // groups, unit % groups
        key, value = k[0] + b * k[1] + g * k[2], v[0] + b * v[1] + g * v[2]
        pack_transposed(key, k[3], width * size, length // PANEL, keys_by_width, key_step)
        pack_transposed(value, v[3], width * size, length // PANEL, values_by_width, key_step)
        pack(key, k[3], length, width // PANEL, keys_by_key, width_step, size)
        for a in range(g * heads, (g + 1) * heads):
            for first in range(0, length, ROWS):
                count = min(ROWS, length - first)
                keys = first + count
                one = q[0] + b * q[1] + a * q[2] + first * q[3]
                upstream = grad[0] + b * grad[1] + a * grad[2] + first * grad[3]
                for p in range(keys // PANEL):
                    at = score_at + 128 * p
                    tiles(one, q[3], keys_by_width + p * key_step, lanes, 0, at, score_row, 0, count, 0, 0, size)
                    at += ROWS * score_row
                    panel = values_by_width + p * key_step
                    tiles(upstream, grad[3], panel, lanes, 0, at, score_row, 0, count, 0, 0, size)
                at_rows = b * length + first, a * width, width
                log_sums = log_sum[b * groups * heads + a]
                _score_gradients(score, first, count, keys, scale, log_sums, out_rows, grad_rows, at_rows, kept)
                for p in range(width // PANEL):
                    panel = keys_by_key + p * width_step
                    to = grad_q[0] + b * grad_q[1] + a * grad_q[2] + first * grad_q[3] + PANEL * size * p
                    at, key_lanes = kept_at + ROWS * kept_row, keys * size // 4
                    tiles(at, kept_row, panel, key_lanes, 0, to, grad_q[3], size == 2, count, 0, 0, size)
                begun = first if a == g * heads else length
                done = a + 1 == (g + 1) * heads and keys == length
                pack(one, q[3], count, width // PANEL, right, block_step, size)
                at = kept_at + ROWS * kept_row
                to = grad_k[0] + b * grad_k[1] + g * grad_k[2] if done else 0
                _add_outer(
                    at, kept_row, right, block_step, first, count, sums_at, begun, to, grad_k[3], left, width, size
                )
                pack(upstream, grad[3], count, width // PANEL, right, block_step, size)
                at = sums_at + sums_step
                to = grad_v[0] + b * grad_v[1] + g * grad_v[2] if done else 0
                _add_outer(
                    kept_at, kept_row, right, block_step, first, count, at, begun, to, grad_v[3], left, width, size
                )

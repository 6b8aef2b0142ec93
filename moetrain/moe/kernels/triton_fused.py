"""The sums, the SwiGLU and the cross entropy in Triton: one read and one write of memory; fp32, bf16
and fp16.

What is added up is added in fp32, in the same order each time and without atomics. Importing this imports Triton; it
runs on GPUs, and under Triton's interpreter (TRITON_INTERPRET=1) on CPUs, for tests.

Of a block of columns every thread loads 16 bytes at once where rows begin at multiples of 16 elements.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.moe.kernels.bags import Bags

SUM_BLOCK, SUM_WARPS = 1024, 2  # columns of a program, and its warps
SWIGLU_BLOCK, SWIGLU_WARPS = 1024, 4
LOGITS_BLOCK, LOGITS_WARPS = 4096, 8


@triton.jit
def _sum_rows(  # type: ignore[no-untyped-def]
    rows, weight, row_of, begin_of, own, out, width, rows_stride, own_stride, BLOCK: tl.constexpr
):
    """A program sums a block of one bag. While a row is under way, so is the number of the next."""
    blocks = tl.cdiv(width, BLOCK)
    bag = (tl.program_id(0) // blocks).to(tl.int64)
    column_C = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside_C = column_C < width
    begin, end = tl.load(begin_of + bag), tl.load(begin_of + bag + 1)
    row = tl.load(row_of + begin, mask=begin < end, other=0)
    total_C = tl.zeros((BLOCK,), tl.float32)
    if own is not None:
        total_C = tl.load(own + bag * own_stride + column_C, mask=inside_C, other=0.0).to(tl.float32)
    for at in range(begin, end):
        x_C = tl.load(rows + row * rows_stride + column_C, mask=inside_C, other=0.0)
        scale = 1.0
        if weight is not None:
            scale = tl.load(weight + row)
        row = tl.load(row_of + at + 1, mask=at + 1 < end, other=0)
        total_C += x_C.to(tl.float32) * scale
    tl.store(out + bag * width + column_C, total_C.to(out.dtype.element_ty), mask=inside_C)


@triton.jit
def _swiglu(gate_up, out, width, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program computes a block of one row."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column_C = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside_C = column_C < width
    at_C = gate_up + row * stride + column_C
    gate_C = tl.load(at_C, mask=inside_C, other=0.0).to(tl.float32)
    up_C = tl.load(at_C + width, mask=inside_C, other=0.0).to(tl.float32)
    hidden_C = gate_C * tl.sigmoid(gate_C) * up_C
    tl.store(out + row * width + column_C, hidden_C.to(out.dtype.element_ty), mask=inside_C)


@triton.jit
def _swiglu_backward(  # type: ignore[no-untyped-def]
    gate_up, grad, weight, grad_weight, width, stride, grad_stride, BLOCK: tl.constexpr
):
    """A program computes one row, block after block."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + row)
    total_C = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        column_C = begin + tl.arange(0, BLOCK)
        inside_C = column_C < width
        at_C, grad_at_C = gate_up + row * stride + column_C, grad + row * grad_stride + column_C
        gate_C = tl.load(at_C, mask=inside_C, other=0.0).to(tl.float32)
        up_C = tl.load(at_C + width, mask=inside_C, other=0.0).to(tl.float32)
        grad_C = tl.load(grad_at_C, mask=inside_C, other=0.0).to(tl.float32)
        sigmoid_C = tl.sigmoid(gate_C)
        silu_C = gate_C * sigmoid_C
        hidden_C = silu_C * up_C
        total_C += grad_C * hidden_C
        weighted_C = w * grad_C
        slope_C = sigmoid_C + silu_C * (1.0 - sigmoid_C)
        tl.store(at_C, (weighted_C * up_C * slope_C).to(gate_up.dtype.element_ty), mask=inside_C)
        tl.store(at_C + width, (weighted_C * silu_C).to(gate_up.dtype.element_ty), mask=inside_C)
        tl.store(grad_at_C, (w * hidden_C).to(grad.dtype.element_ty), mask=inside_C)
    tl.store(grad_weight + row, tl.sum(total_C))


@triton.jit
def _cross_entropy(logits, target, nats, lse, width, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program reads one row once: in every column of the block its own maximum and its own sum, joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.arange(0, BLOCK)
    most_C = tl.load(logits + row * stride + column_C, mask=column_C < width, other=float("-inf")).to(tl.float32)
    total_C = tl.where(column_C < width, 1.0, 0.0)
    for begin in range(BLOCK, width, BLOCK):
        inside_C = begin + column_C < width
        x_C = tl.load(logits + row * stride + begin + column_C, mask=inside_C, other=float("-inf")).to(tl.float32)
        higher_C = tl.maximum(most_C, x_C)
        total_C = total_C * tl.exp(most_C - higher_C) + tl.exp(x_C - higher_C)
        most_C = higher_C
    most = tl.max(most_C)
    denominator = most + tl.log(tl.sum(total_C * tl.exp(most_C - most)))
    tl.store(lse + row, denominator)
    tl.store(nats + row, denominator - tl.load(logits + row * stride + tl.load(target + row)).to(tl.float32))


@triton.jit
def _cross_entropy_backward(  # type: ignore[no-untyped-def]
    logits, target, lse, grad, width, stride, BLOCK: tl.constexpr
):
    """A program computes a block of one row, in place."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column_C = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside_C = column_C < width
    at_C = logits + row * stride + column_C
    x_C = tl.load(at_C, mask=inside_C, other=0.0).to(tl.float32)
    slope_C = tl.exp(x_C - tl.load(lse + row)) - tl.where(column_C == tl.load(target + row), 1.0, 0.0)
    tl.store(at_C, (slope_C * tl.load(grad + row)).to(logits.dtype.element_ty), mask=inside_C)


def swiglu(gate_up_MH2: Tensor) -> Tensor:
    """As `Backend.swiglu`."""
    num_rows, width = len(gate_up_MH2), gate_up_MH2.shape[1] // 2
    out = gate_up_MH2.new_empty(num_rows, width)
    launch(
        _swiglu,
        num_rows * triton.cdiv(width, SWIGLU_BLOCK),
        *(gate_up_MH2, out, width, gate_up_MH2.stride(0)),
        BLOCK=SWIGLU_BLOCK,
        num_warps=SWIGLU_WARPS,
    )
    return out


def swiglu_backward(gate_up_MH2: Tensor, grad_MH: Tensor, weight_M: Tensor) -> Tensor:
    """As `Backend.swiglu_backward`, in place."""
    out = torch.empty_like(weight_M)
    launch(
        _swiglu_backward,
        len(out),
        *(gate_up_MH2, grad_MH, weight_M, out, grad_MH.shape[1], gate_up_MH2.stride(0), grad_MH.stride(0)),
        BLOCK=SWIGLU_BLOCK,
        num_warps=SWIGLU_WARPS,
    )
    return out


def sum_rows(rows_MD: Tensor, weight_M: Tensor | None, bags: Bags, own_BD: Tensor | None = None) -> Tensor:
    """As `Backend.sum_rows`."""
    num_bags, width = len(bags.begin_B) - 1, rows_MD.shape[1]
    out = rows_MD.new_empty(num_bags, width)
    own_stride = 0 if own_BD is None else own_BD.stride(0)
    launch(
        _sum_rows,
        num_bags * triton.cdiv(width, SUM_BLOCK),
        *(rows_MD, weight_M, bags.row_M, bags.begin_B, own_BD, out, width, rows_MD.stride(0), own_stride),
        BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS,
    )
    return out


def cross_entropy(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """As `Backend.cross_entropy`."""
    (num_rows, width), stride = logits_TV.shape, logits_TV.stride(0)
    nats_T, lse_T = (torch.empty(num_rows, dtype=torch.float32, device=logits_TV.device) for _ in range(2))
    arguments = (logits_TV, target_T, nats_T, lse_T, width, stride)
    launch(_cross_entropy, num_rows, *arguments, BLOCK=LOGITS_BLOCK, num_warps=LOGITS_WARPS)
    return nats_T, lse_T


def cross_entropy_backward(logits_TV: Tensor, target_T: Tensor, lse_T: Tensor, grad_T: Tensor) -> Tensor:
    """As `Backend.cross_entropy_backward`, in place."""
    (num_rows, width), stride = logits_TV.shape, logits_TV.stride(0)
    programs = num_rows * triton.cdiv(width, LOGITS_BLOCK)
    arguments = (logits_TV, target_T, lse_T, grad_T, width, stride)
    launch(_cross_entropy_backward, programs, *arguments, BLOCK=LOGITS_BLOCK, num_warps=LOGITS_WARPS)
    return logits_TV


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    if programs:  # a product is rounded before it is added, as torch does it
        kernel[(programs,)](*arguments, enable_fp_fusion=False, **options)

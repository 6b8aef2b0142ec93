"""Rows in FP8 (e4m3) with a scale each, in Triton: one read of memory beside that of the largest value, one write.

Importing this imports Triton; it runs on GPUs, and under Triton's interpreter on CPUs, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 4  # columns that a program reads at a time


@triton.jit
def _quantize_rows(  # type: ignore[no-untyped-def]
    x, out, scale, width, stride, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    """A program makes one row: its largest value first, then block after block, which are in the cache by then."""
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.arange(0, BLOCK)
    most_C = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        inside_C = begin + column_C < width
        x_C = tl.load(x + row * stride + begin + column_C, mask=inside_C, other=0.0).to(tl.float32)
        most_C = tl.maximum(most_C, tl.abs(x_C))
    factor = tl.div_rn(tl.maximum(tl.max(most_C), LEAST), LARGEST)
    tl.store(scale + row, factor)
    for begin in range(0, width, BLOCK):
        inside_C = begin + column_C < width
        x_C = tl.load(x + row * stride + begin + column_C, mask=inside_C, other=0.0).to(tl.float32)
        tl.store(out + row * width + begin + column_C, tl.div_rn(x_C, factor).to(out.dtype.element_ty), mask=inside_C)


def quantize_rows(x: Tensor, dtype: torch.dtype, largest: float, least: float) -> tuple[Tensor, Tensor]:
    """As `fp8.quantize_rows`; `largest` of `dtype`, `least` of a row."""
    rows = x.reshape(-1, x.shape[-1])
    out, scale = torch.empty(x.shape, dtype=dtype, device=x.device), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _quantize_rows[(len(rows),)](
        rows, out, scale, rows.shape[1], rows.stride(0), LARGEST=largest, LEAST=least, BLOCK=BLOCK, num_warps=WARPS
    )
    return out, scale

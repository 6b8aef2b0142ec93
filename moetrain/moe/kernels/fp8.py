"""The experts' forward products in FP8 (e4m3), each row with a scale of its own; gradients in the rows' dtype.

The forward multiplies in FP8 and adds up in the GPU's accumulators; results are in the rows' dtype. Weight gradients,
whose errors add up in the weights, stay as they are; so do gradients of rows, whose weights would have to be copied for
their other direction: an H100 lost more by it than it gained. A CPU multiplies the rounded values instead, for tests.

M rows, A and B widths, S slots.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moetrain.moe.kernels.bags import upload
from moetrain.moe.kernels.reference import LoopedProducts, Matrices, ProductKernels

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
LEAST = 1e-12  # of the largest value of a row: smaller ones become zero
MULTIPLE = 16  # widths are multiples of this: 16 bytes


def is_supported(device: torch.device) -> bool:
    """Tell whether torch multiplies segments in FP8 with row-wise scales on this device: Hopper, and no CPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [..., A], contiguous, in FP8, and the fp32 scales [...] that it is to be multiplied with again."""
    if x.device.type == "cuda" and x.numel():
        from moetrain.moe.kernels import triton_fp8

        return triton_fp8.quantize_rows(x, DTYPE, LARGEST, LEAST)
    scale = x.abs().amax(-1).float().clamp(min=LEAST) / LARGEST
    return (x.float() / scale[..., None]).to(DTYPE), scale


@dataclass(frozen=True)
class Fp8Products:
    """Grouped products, those of the forward in FP8."""

    wide: ProductKernels  # for gradients

    def segment_mm(self, rows_MA: Tensor, weights: Matrices, sizes: list[int], out_MB: Tensor, transpose: bool) -> None:
        """As `Backend.segment_mm`; rows in bf16."""
        if not transpose:
            self.wide.segment_mm(rows_MA, weights, sizes, out_MB, transpose=False)
            return
        if not len(rows_MA):
            return
        stacked = weights if isinstance(weights, Tensor) else torch.stack(list(weights))
        rows, scale_M = quantize_rows(rows_MA)
        weight_SBA, scale_SB = quantize_rows(stacked)
        if rows_MA.device.type == "cpu":
            plain_MA, plain_SBA = rows.float() * scale_M[:, None], weight_SBA.float() * scale_SB[..., None]
            wide_MB = plain_MA.new_empty(out_MB.shape)
            LoopedProducts.segment_mm(plain_MA, plain_SBA, sizes, wide_MB, transpose=True)
            out_MB.copy_(wide_MB)
        else:
            out_MB.copy_(multiply(rows, scale_M, weight_SBA, scale_SB, sizes, out_MB.dtype))

    def segment_outer(
        self, left_MA: Tensor, right_MB: Tensor, sizes: list[int], out_SAB: Matrices, add: bool
    ) -> Matrices:
        """As `Backend.segment_outer`."""
        return self.wide.segment_outer(left_MA, right_MB, sizes, out_SAB, add)


def multiply(
    rows_MA: Tensor, scale_M: Tensor, weight_SBA: Tensor, scale_SB: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    """Return [M, B] in `dtype`: the rows of each segment times the transposed weight of its slot, all in FP8."""
    ends = upload(np.cumsum(sizes).astype(np.int32), rows_MA.device)
    return torch._scaled_grouped_mm(
        rows_MA, weight_SBA.mT, scale_M, scale_SB, offs=ends, out_dtype=dtype, use_fast_accum=True
    )

"""The arithmetic of the experts in plain torch: what every device can do, and the specification of all other kernels.

All sums run in fp32 and in a fixed order.

M rows, D width, H expert hidden width, S slots, B bags, T tokens, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.kernels.bags import Bags

Matrices = Tensor | Sequence[Tensor]  # [S] of them


def sum_rows(rows_MD: Tensor, weight_M: Tensor | None, bags: Bags, own_BD: Tensor | None = None) -> Tensor:
    """Return [B, D]: each bag's own row, if there are any, plus its rows times their weights, one after another."""
    if own_BD is None:
        total_BD = rows_MD.new_zeros(len(bags.begin_B) - 1, rows_MD.shape[1], dtype=torch.float32)
    else:
        total_BD = own_BD.float().clone()
    last = len(rows_MD) - 1
    size_B = bags.begin_B.diff()
    for place in range(bags.most if last >= 0 else 0):  # the first rows of all bags, then the second ones, and so on
        row_B = bags.row_M[(bags.begin_B[:-1] + place).clamp(max=last)]
        part_BD = rows_MD.index_select(0, row_B).float()
        if weight_M is not None:
            part_BD *= weight_M[row_B, None]
        total_BD += torch.where((size_B > place)[:, None], part_BD, 0.0)
    return total_BD.to(rows_MD.dtype)


def swiglu(gate_up_MH2: Tensor) -> Tensor:
    """Return [M, H]: silu(gate) · up."""
    gate_MH, up_MH = gate_up_MH2.chunk(2, dim=1)
    return F.silu(gate_MH).mul_(up_MH)


def swiglu_backward(gate_up_MH2: Tensor, grad_MH: Tensor, weight_M: Tensor) -> Tensor:
    """As `Backend.swiglu_backward`, in place."""
    gate_MH, up_MH = gate_up_MH2.chunk(2, dim=1)
    weight_M1 = weight_M[:, None]  # fp32: what is weighted is rounded once
    silu_MH = F.silu(gate_MH)
    hidden_MH = silu_MH * up_MH
    grad_weight_M: Tensor = torch.linalg.vecdot(grad_MH.float(), hidden_MH.float())
    weighted_MH = torch.mul(grad_MH, weight_M1, out=torch.empty_like(grad_MH))
    grad_gate_MH = torch.ops.aten.silu_backward(weighted_MH * up_MH, gate_MH)
    gate_up_MH2[:, gate_MH.shape[1] :] = weighted_MH.mul_(silu_MH)
    gate_up_MH2[:, : gate_MH.shape[1]] = grad_gate_MH
    torch.mul(hidden_MH, weight_M1, out=grad_MH)
    return grad_weight_M


def cross_entropy(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """As `Backend.cross_entropy`."""
    logits_TV = logits_TV.float()
    nats_T = F.cross_entropy(logits_TV, target_T, reduction="none")
    return nats_T, nats_T + logits_TV.gather(1, target_T[:, None])[:, 0]


def cross_entropy_backward(logits_TV: Tensor, target_T: Tensor, lse_T: Tensor, grad_T: Tensor) -> Tensor:
    """As `Backend.cross_entropy_backward`; the logits stay."""
    grad_TV = logits_TV.softmax(1, dtype=torch.float32).mul_(grad_T[:, None])
    return grad_TV.scatter_add_(1, target_T[:, None], -grad_T[:, None]).to(logits_TV.dtype)


class ProductKernels(Protocol):
    """The products of segments of rows, each with a matrix of its own."""

    def segment_mm(
        self, rows_MA: Tensor, weights: Matrices, sizes: list[int], out_MB: Tensor, transpose: bool
    ) -> None: ...

    def segment_outer(
        self, left_MA: Tensor, right_MB: Tensor, sizes: list[int], out_SAB: Matrices, add: bool
    ) -> Matrices: ...


class LoopedProducts:
    """One product of torch's for each segment."""

    @staticmethod
    def segment_mm(rows_MA: Tensor, weights: Matrices, sizes: list[int], out_MB: Tensor, transpose: bool) -> None:
        """As `Backend.segment_mm`."""
        begin = 0
        for weight, size in zip(weights, sizes, strict=True):
            end = begin + size
            torch.mm(rows_MA[begin:end], weight.t() if transpose else weight, out=out_MB[begin:end])
            begin = end

    @staticmethod
    def segment_outer(left_MA: Tensor, right_MB: Tensor, sizes: list[int], out_SAB: Matrices, add: bool) -> Matrices:
        """As `Backend.segment_outer`."""
        begin = 0
        for out_AB, size in zip(out_SAB, sizes, strict=True):
            end = begin + size
            if add:
                out_AB.addmm_(left_MA[begin:end].t(), right_MB[begin:end])
            else:
                torch.mm(left_MA[begin:end].t(), right_MB[begin:end], out=out_AB)
            begin = end
        return out_SAB


class GroupedProducts:
    """All segments in one grouped product of torch's, which GPUs have for bf16 from Hopper on.

    Elsewhere torch would loop and wait for the device each time. cuBLAS takes 0.15 ms for a product of a size that is
    new to it, ten times that of one that it knows (H100), and routing brings new sizes in every step.
    """

    @staticmethod
    def segment_mm(rows_MA: Tensor, weights: Matrices, sizes: list[int], out_MB: Tensor, transpose: bool) -> None:
        """As `Backend.segment_mm`."""
        if len(rows_MA):  # torch's grouped product writes nowhere but to memory of its own
            stacked = weights if isinstance(weights, Tensor) else torch.stack(list(weights))
            ends = _ends(sizes, rows_MA.device)
            out_MB.copy_(F.grouped_mm(rows_MA, stacked.mT if transpose else stacked, offs=ends))

    @staticmethod
    def segment_outer(left_MA: Tensor, right_MB: Tensor, sizes: list[int], out_SAB: Matrices, add: bool) -> Matrices:
        """As `Backend.segment_outer`."""
        filled = [s for s, size in enumerate(sizes) if size]  # what a product over no rows is differs between GPUs
        if filled:
            ends = _ends([sizes[s] for s in filled], left_MA.device)
            found_FAB = F.grouped_mm(left_MA.t(), right_MB, offs=ends)
            if len(filled) == len(sizes) and isinstance(out_SAB, Tensor) and not add:
                return found_FAB
            put = torch._foreach_add_ if add else torch._foreach_copy_
            put([out_SAB[s] for s in filled], list(found_FAB))
        return out_SAB if add else _fill_zero(out_SAB, set(range(len(sizes))) - set(filled))


def _fill_zero(out_SAB: Matrices, slots: Iterable[int]) -> Matrices:
    for s in slots:
        out_SAB[s].zero_()
    return out_SAB


def _ends(sizes: list[int], device: torch.device) -> Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32).to(device, non_blocking=True)


@cache
def has_grouped_mm() -> bool:
    """Tell whether torch has grouped products for this host's GPUs: from Hopper on, in bf16."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)

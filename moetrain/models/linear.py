"""Dense products: torch's, but in fp32 on CPUs where the experts' GEMM is faster than those (`moe.cpu_gemm`).

M rows, K width in, N width out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.kernels import cpu_gemm
from moetrain.moe.kernels.api import KernelChoice, KernelUser


def is_ours(x_MK: Tensor, weight_NK: Tensor, kernels: KernelChoice) -> bool:
    """Whether `cpu_gemm` is to multiply them."""
    return (
        x_MK.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and kernels.has_own_products(x_MK, weight_NK)
        and len(weight_NK) % 32 == 0
    )


def times_transposed(x_MK: Tensor, weight_NK: Tensor, kernels: KernelChoice) -> Tensor:
    """[M, N] x Wᵀ. No gradient."""
    if not is_ours(x_MK, weight_NK, kernels):
        return x_MK @ weight_NK.T
    out_MN = x_MK.new_empty(len(x_MK), len(weight_NK))
    cpu_gemm.segment_mm(x_MK, [weight_NK], [len(x_MK)], out_MN, transpose=True)
    return out_MN


def times(grad_MN: Tensor, weight_NK: Tensor, kernels: KernelChoice) -> Tensor:
    """[M, K] g W: the gradient of x. No gradient of its own."""
    if not is_ours(grad_MN, weight_NK, kernels):
        return grad_MN @ weight_NK
    out_MK = grad_MN.new_empty(len(grad_MN), weight_NK.shape[1])
    cpu_gemm.segment_mm(grad_MN, [weight_NK], [len(grad_MN)], out_MK, transpose=False)
    return out_MK


def add_outer(grad_MN: Tensor, x_MK: Tensor, total_NK: Tensor, kernels: KernelChoice) -> None:
    """total += gᵀ x: the gradient of W, in fp32."""
    if is_ours(x_MK, total_NK, kernels) and grad_MN.is_contiguous():
        cpu_gemm.segment_outer(grad_MN, x_MK, [len(x_MK)], [total_NK], add=True)
    elif grad_MN.dtype == torch.float32:
        total_NK.addmm_(grad_MN.T, x_MK)  # a product apart would be as large as the weight
    else:
        total_NK += grad_MN.T @ x_MK


class Linear(nn.Linear, KernelUser):
    """`nn.Linear` without bias."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if is_ours(x, self.weight, self.kernel_choice):
            return _Linear.apply(x, self.weight, self.kernel_choice)
        return F.linear(x, self.weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, kernels: KernelChoice) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        ctx.kernels = kernels
        return times_transposed(x.view(-1, x.shape[-1]), weight_NK, kernels).view(*x.shape[:-1], len(weight_NK))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight_NK = ctx.saved_tensors
        x_MK, grad_MN = x.view(-1, x.shape[-1]), grad.contiguous().view(-1, grad.shape[-1])
        grad_x = grad_weight_NK = None
        if ctx.needs_input_grad[0]:
            grad_x = times(grad_MN, weight_NK, ctx.kernels).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight_NK = torch.empty_like(weight_NK)
            cpu_gemm.segment_outer(grad_MN, x_MK, [len(x_MK)], [grad_weight_NK], add=False)
        return grad_x, grad_weight_NK, None

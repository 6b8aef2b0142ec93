"""Experts that compute next to nothing: zero, copy and constant (MoE++, Jin et al., 2024, Eq. 3 to 5).

They are numbered after the experts that compute: E + [zero..., copy..., constant...]. Every rank has them all, so
their selections never travel.

T tokens here, D width, E experts that compute, Z that do not, C constants, N selections.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.options import ZeroComputeOptions
from moetrain.moe.routing.base import Replicated


class ZeroCompute(Replicated):
    """Zero: 0. Copy: x. Constant: α1 x + α2 v with [α1, α2] = softmax(W x), v [D] and W [2, D] its parameters."""

    def __init__(self, dim: int, num_experts: int, options: ZeroComputeOptions) -> None:
        """`num_experts`: those that compute, which are numbered first."""
        super().__init__()
        self.num_experts, self.num_zero, self.num_copy = num_experts, options.zero, options.copy
        self.num_all = num_experts + options.total
        constants = options.constant
        self.vector = nn.Parameter(torch.empty(constants, dim)) if constants else None  # v [C, D]
        self.mix = nn.Parameter(torch.empty(constants, 2, dim)) if constants else None  # W [C, 2, D]
        self.reset_parameters()

    def forward(self, x_TD: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
        """[T, D]: the weighted sum of each token's experts of this kind; other selections are passed over."""
        place_N = token_N * self.num_all + expert_N
        weight_TZ = weight_N.new_zeros(len(x_TD) * self.num_all).scatter(0, place_N, weight_N)
        weight_TZ = weight_TZ.view(len(x_TD), self.num_all)[:, self.num_experts + self.num_zero :]
        wide_TD = x_TD.float()
        of_x_T = weight_TZ[:, : self.num_copy].sum(1)
        y_TD = None
        if self.vector is not None and self.mix is not None:
            alpha_TC2 = F.linear(wide_TD, self.mix.float().flatten(0, 1)).unflatten(1, (-1, 2)).softmax(-1)
            weighted_TC2 = weight_TZ[:, self.num_copy :, None] * alpha_TC2
            of_x_T = of_x_T + weighted_TC2[..., 0].sum(1)
            y_TD = weighted_TC2[..., 1] @ self.vector.float()
        copied_TD = of_x_T[:, None] * wide_TD
        return (copied_TD if y_TD is None else copied_TD + y_TD).to(x_TD.dtype)

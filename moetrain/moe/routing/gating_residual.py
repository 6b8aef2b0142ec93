"""Routers that build on the layer before. T tokens, D model width, E experts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.options import GatingResidualOptions, RouterOptions
from moetrain.moe.routing.base import Place
from moetrain.moe.routing.topk import TopK


class GatingResidual(TopK):
    """The logits of the previous MoE layer, mixed, are added: G_j = W_j x_j + V_j G_{j-1} (MoE++, Jin et al., 2024,
    Eq. 6). The carry is G. All layers have equally many experts.
    """

    Options = GatingResidualOptions

    def __init__(self, dim: int, num_experts: int, options: RouterOptions | None = None, index: int = 0) -> None:
        super().__init__(dim, num_experts, options, index)
        self.residual = nn.Parameter(torch.empty(num_experts, num_experts)) if index else None
        self.reset_parameters()

    def logits(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Tensor, Any]:
        logits_TE, _ = super().logits(x_TD, carry, place)
        if self.residual is not None and carry is not None:
            logits_TE = logits_TE + F.linear(carry, self.residual.float())
        return logits_TE, logits_TE

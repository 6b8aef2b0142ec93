"""Routers that build on the layer before. T tokens, D model width, E experts."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain import config
from moetrain.moe.routing.base import Place
from moetrain.moe.routing.topk import TopK


class GatingResidual(TopK):
    """The logits of the previous MoE layer, mixed, are added: G_j = W_j x_j + V_j G_{j-1} (MoE++, Jin et al., 2024,
    Eq. 6). The carry is G. All layers have equally many experts.
    """

    takes = frozenset({"noise", "groups", "top_groups"})

    def __init__(self, dim: int, num_experts: int, options: config.Router, index: int = 0) -> None:
        super().__init__(dim, num_experts, options, index)
        self.residual = nn.Parameter(torch.empty(num_experts, num_experts)) if index else None

    @classmethod
    def problems(cls, num_experts: int, m: config.Model, r: config.Router) -> Iterator[tuple[str, str]]:
        if m.expert_schedule != "uniform":
            yield (
                "model.expert_schedule",
                "must be uniform for the router gating_residual: it adds the last layer's logits",
            )
        yield from super().problems(num_experts, m, r)

    def logits(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Tensor, Any]:
        logits_TE, _ = super().logits(x_TD, carry, place)
        if self.residual is not None and carry is not None:
            logits_TE = logits_TE + F.linear(carry, self.residual.float())
        return logits_TE, logits_TE

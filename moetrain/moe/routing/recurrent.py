"""Routers that build on the layer before: what one hands on is the next one's `carry`.

T tokens, D model width, E experts, P width of the state.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.options import GatingResidualOptions, RecurrentOptions, RouterOptions
from moetrain.moe.routing.base import Place, Replicated
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


class RecurrentState(NamedTuple):
    """What a layer's router hands to the next one's."""

    cell: "RecurrentCell"
    state_TP: Tensor | None  # fp32; None before the first layer: zeros


class RecurrentCell(Replicated):
    """The gated recurrent unit that all layers share; without biases, as the paper's equations have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRUCell(width, width, bias=False)  # draws its weights itself
        self.init_std = (3 * width) ** -0.5  # torch's own: uniform up to 1 / sqrt(width)

    def forward(self) -> RecurrentState:
        """The carry of the first layer."""
        return RecurrentState(self, None)


class Recurrent(TopK):
    """The state of a recurrent unit over the layers chooses (RMoE, Qiu et al., ICLR 2025, Eq. 4 to 6):
    h_i = GRU(x_i W_i, h_{i-1}), h_0 = 0, logits G_i h_i. W_i and G_i are the layer's own, the unit is shared by all.
    """

    Options = RecurrentOptions
    options: RecurrentOptions

    def __init__(self, dim: int, num_experts: int, options: RecurrentOptions | None = None, index: int = 0) -> None:
        options = options or RecurrentOptions()
        super().__init__(options.state_dim, num_experts, options, index)
        self.project = nn.Parameter(torch.empty(options.state_dim, dim))
        self.init_std = options.state_dim**-0.5
        self.reset_parameters()

    @classmethod
    def shared(cls, options: RouterOptions) -> RecurrentCell:
        assert isinstance(options, RecurrentOptions)
        return RecurrentCell(options.state_dim)

    def logits(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Tensor, Any]:
        memory: RecurrentState = carry
        if memory is None:
            raise ValueError(
                "the router recurrent needs the carry that RecurrentCell(state_dim)() makes for the first layer"
            )
        state_TP = memory.cell.gru(F.linear(x_TD.float(), self.project.float()), memory.state_TP)
        logits_TE, _ = super().logits(state_TP, carry, place)
        return logits_TE, RecurrentState(memory.cell, state_TP)

"""The K best experts of every token. T tokens, D model width, E experts, K top-k."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain import config
from moetrain.moe.routers.base import Choice, Place, Router, Scores


class TopK(Router):
    """A linear router, the K best experts of every token (Switch, Mixtral, Qwen3-MoE, OLMoE)."""

    def __init__(self, dim: int, num_experts: int, options: config.Router, index: int = 0) -> None:
        super().__init__(dim, num_experts, options, index)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def logits(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Tensor, Any]:
        return F.linear(x_TD.float(), self.weight.float()), carry

    @torch.no_grad()
    def choose(self, scores: Scores, place: Place | None = None) -> Choice:
        num_tokens, k = len(scores.logits_TE), self.options.top_k
        best_TE = scores.logits_TE if self.bias is None else self.gates(scores) + self.bias
        expert_TK = best_TE.topk(k, dim=-1).indices
        token_N = torch.arange(num_tokens, device=expert_TK.device).repeat_interleave(k)
        return Choice(token_N, expert_TK.flatten())
